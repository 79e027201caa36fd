"""The pre-flight by trtcheck, a checker that knows TensorRT up to 10.3.

It finds what is wrong with a graph as a whole, and vouches for no operator that it has not got. Of
what it says of operators, our table has the last word: the table says where it has it from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx
import trtcheck
from trtcheck.analyzer import Analyzer, AnalyzerConfig
from trtcheck.types import Issue, Severity

from gap_export.engines.operators import Release
from gap_export.exporting.preflight.finding import Finding, Kind

_TARGET = "10.3"
_UNKNOWN = "TRT-OP-UNCLASSIFIED"
# Of an operator, by its name: our table knows more.
_OF_OPERATORS = "TRT-OP-"
# What it warns of, and why it is no matter here. Where nothing is to be said, the reason is empty.
_SETTLED: Mapping[str, str] = MappingProxyType(
    {
        # TensorRT has had INT64 since 9.0, bfloat16 since 9.0 on the generations that are targets.
        "TRT-DTYPE-INT64-WEIGHTS": "",
        "TRT-DTYPE-INT64-INPUT": "",
        "TRT-DTYPE-BF16": "",
        # Our builder makes a profile for every dimension.
        "TRT-SHAPE-PROFILE-MISSING": "",
        "TRT-DTYPE-UINT8-INPUT": "operators.md has uint8 as a type of inputs and outputs",
        "TRT-DTYPE-FP64": "operators.md has float64 read as float32",
    }
)


def ask_trtcheck(
    model: onnx.ModelProto, release: Release, *, already: Sequence[Finding]
) -> list[Finding]:
    """What trtcheck adds.

    Args:
        model: Its structure; not written to.
        release: For which, of ours.
        already: What the table says.
    """
    config = AnalyzerConfig(target_trt=_TARGET, discover_entry_point_plugins=False)
    report = Analyzer(config).analyze_model(model)
    found = {finding.operator for finding in already if finding.counts}
    findings: dict[Finding, None] = {}
    unknown: list[str] = []
    for issue in report.issues:
        known = bool(release.operators.get(issue.operator))
        if issue.rule_id == _UNKNOWN and known:
            unknown.append(issue.operator)
        elif issue.operator not in found or not issue.rule_id.startswith(_OF_OPERATORS):
            finding = _judge(issue, release, known=known)
            if finding is not None:
                findings.setdefault(finding)
    if unknown:
        names = ", ".join(sorted(set(unknown)))
        reason = f"{_name()} does not know {names}; vouched for by {release.evidence}"
        findings.setdefault(Finding(kind="note", operator=None, reason=reason))
    return list(findings)


def _judge(issue: Issue, release: Release, *, known: bool) -> Finding | None:
    settled = _SETTLED.get(issue.rule_id)
    text = f"{_name()}: {issue.message.splitlines()[0].rstrip('.')}"
    if settled is not None:
        return Finding(kind="note", operator=None, reason=f"{text}; {settled}") if settled else None
    grave = issue.severity is Severity.CRITICAL
    if not grave and not issue.verify_required:
        return None
    if known and issue.rule_id.startswith(_OF_OPERATORS):
        reason = f"{text}; {release.evidence} say otherwise"
        return Finding(kind="note", operator=issue.operator, reason=reason)
    operator = issue.operator if known else None
    kind: Kind = "blocked" if grave else "unverified"
    return Finding(kind=kind, operator=operator, reason=text)


def _name() -> str:
    return f"trtcheck {trtcheck.__version__}"
