"""An ONNX file of a bundle as a TensorRT network, and what can be said where that fails."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.bundle import Bundle
from gap_export.engines.library import TensorRT
from gap_export.engines.log import log_of, quote
from gap_export.engines.targets import TargetChoice
from gap_export.errors import EngineError
from gap_export.graph.onnx_file import OnnxFile
from gap_export.spec.manifest import GraphSpec

# What TensorRT, its driver and the C++ library say where memory is short.
_OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|cudaErrorMemoryAllocation|could not be allocated", re.IGNORECASE
)
_NAME = re.compile(r"[\w./:-]+")
# Nodes that a message names at most.
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class ParsedGraph:
    """A graph that TensorRT took.

    Attributes:
        builder: The IBuilder.
        network: The INetworkDefinition.
        parser: Its constants lie in the parser's memory, which must live as long.
    """

    builder: Any
    network: Any
    parser: Any


def parse_graph(library: TensorRT, graph: GraphSpec, path: Path, advice: str) -> ParsedGraph:
    """Parse a graph; its weights are read by their offsets, hard links included.

    Args:
        library: TensorRT.
        graph: The manifest's entry.
        path: The graph's file.
        advice: What the user can do where TensorRT has not got an operator.

    Raises:
        EngineError: TensorRT does not start, or does not take a node or the file.
    """
    module, log = library.module, log_of(library.module)
    with log.recording() as errors:
        try:
            builder = module.Builder(log.handle)
        except (TypeError, RuntimeError) as err:
            # pybind11's word for a null pointer: no driver, or no GPU.
            raise EngineError(
                f"{library.name} {library.version} cannot start a builder",
                seen=quote(errors or [str(err)]),
                fix="check the GPU and its driver with: gap-export doctor",
            ) from err
    # Precision is what the graph says, nothing else. A release that knows no other way has no flag.
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = module.OnnxParser(network, log.handle)
    with log.recording() as errors:
        parsed = parser.parse_from_file(str(path))
    if parsed:
        return ParsedGraph(builder=builder, network=network, parser=parser)
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [*(str(error.desc()) for error in found), *errors]
    if _is_out_of_memory(said):
        raise out_of_memory(graph, quote(said))
    # Later errors are consequences of the first. One without an operator is about the file.
    if found and found[0].node_operator():
        raise _refused(library, graph, found[0], advice)
    raise EngineError(
        f"{library.name} {library.version} cannot read {graph.file}",
        seen=quote(said),
        fix="check the bundle with gap-export inspect; export it again",
    )


def other_ways(bundle: Bundle, graph: GraphSpec, choice: TargetChoice, library: TensorRT) -> str:
    """What to do where TensorRT does not take a graph: another lowering, if there is one."""
    platform = choice.target.platform(library.release)
    assert platform is not None  # see library_for
    others = [name for name in platform.lowerings if name != graph.lowering]
    if not others:
        return (
            f"no other lowering builds on {library.name} {library.version}; report it with the "
            "names above"
        )
    made = {g.lowering for g in bundle.manifest.graphs if g.component == graph.component}
    there = ", which this bundle has for another target" if set(others) & made else ""
    return (
        f"the graph's lowering is {graph.lowering}; try {' or '.join(others)}{there}: gap-export "
        f"MODEL --trt {choice.target.name} --lowering {others[0]}"
    )


def build_failed(
    library: TensorRT, graph: GraphSpec, path: Path, errors: Sequence[str], advice: str
) -> EngineError:
    """The error of a build that gave no engine, from what TensorRT said.

    Args:
        library: TensorRT.
        graph: The manifest's entry.
        path: The graph's file.
        errors: What TensorRT reported, oldest first.
        advice: What the user can do where TensorRT has no kernel for a node.
    """
    text = quote(list(errors))
    if _is_out_of_memory(errors):
        return out_of_memory(graph, text)
    return EngineError(
        f"{library.name} {library.version} cannot build {graph.file}{_where(path, errors)}",
        seen=text,
        fix=advice,
    )


def _is_out_of_memory(errors: Sequence[str]) -> bool:
    return any(_OUT_OF_MEMORY.search(error) for error in errors)


def out_of_memory(graph: GraphSpec, said: str) -> EngineError:
    """The error of a build that memory was too short for."""
    return EngineError(
        f"out of memory while building the engine of {graph.component}",
        seen=said,
        fix="close what else runs or add swap; else build for less: lower --max-prompt or "
        "--batch, set --workspace, or export with --dtype int4",
    )


def _refused(library: TensorRT, graph: GraphSpec, error: Any, advice: str) -> EngineError:
    operator = error.node_operator()
    name = error.node_name() or f"number {error.node()}"
    # A function node's inner node has a name of its own; what calls it is in our graph.
    has_stack = hasattr(error, "local_function_stack") and error.local_function_stack_size() > 0
    calls = [str(frame) for frame in error.local_function_stack()] if has_stack else []
    inside = f" within {' > '.join(calls)}" if calls else ""
    return EngineError(
        f"{library.name} {library.version} does not take operator {operator}, at node {name}"
        f"{inside} of {graph.file}",
        seen=" ".join(str(error.desc()).split()),
        fix=advice,
    )


def _where(path: Path, errors: Sequence[str]) -> str:
    """Nodes of the graph that an error names, or whose operator it does, for the message."""
    file = OnnxFile.read(path)
    operators = {node.name: node.op_type for node in (*file.nodes, *file.function_nodes)}
    found = (word for error in errors for word in _NAME.findall(error))
    # A name at the end of a sentence has its full stop on it.
    words = dict.fromkeys(word.rstrip(".:") for word in found)
    named = [f"{word} ({operators[word]})" for word in words if word in operators]
    if named:
        return f", at node {', '.join(named[:_NAMED])}"
    for word in words:
        nodes = [name for name, operator in operators.items() if operator == word]
        if nodes:
            more = ", ..." if len(nodes) > _NAMED else ""
            return f", it seems at operator {word}: node {', '.join(nodes[:_NAMED])}{more}"
    return ""
