"""Made-up reports of checks."""

from __future__ import annotations

from typing import Any

from gap_export.parity.results import (
    BackendResult,
    BoxRow,
    CheckReport,
    Divergence,
    LevelResult,
    PositionsRow,
    TensorRow,
    TokenRow,
)

# All that somebody could put into an expression, an answer, or the name of a file or tensor.
HOSTILE = (
    "<script>alert(1)</script> </td> \" ' & | `x` **b** [l](javascript:x) ![i](http://a.b/c) "
    "$\\frac$ www.evil.com @all #1 ]]> --> {{ 7*7 }} \x00\x1b[31m\u202e\ud800 \U0001f600\n## new"
)


def tensor_row(**changes: Any) -> TensorRow:
    plain: dict[str, Any] = {
        "component": "vision_encoder",
        "tensor": "image_features",
        "calls": 3,
        "max_abs_diff": 2e-6,
        "mean_abs_diff": 3e-7,
        "p99_abs_diff": 1e-6,
        "max_rel_diff": 1e-4,
        "mean_rel_diff": 1e-6,
        "p99_rel_diff": 1e-5,
        "cosine": 0.999999,
        "num_nonfinite": 0,
        "max_abs_reference": 3.5,
        "atol": 1e-4,
        "rtol": 1e-4,
        "why": "float32: another order of sums",
        "passed": True,
        "reason": "",
    }
    return TensorRow(**{**plain, **changes})


def check_report(text: str = "the red circle", **changes: Any) -> CheckReport:
    """ONNX Runtime fails on every level but ``task``, TensorRT was not run."""
    inf, nan = float("inf"), float("nan")
    exact = {"atol": 0.0, "rtol": 0.0, "why": "indices are exact", "max_abs_diff": 0.0}
    layers = [
        tensor_row(
            component="decoder_model_merged",
            tensor=f"/layers.{n}/self_attn/{text}",
            module=f"layers.{n}.self_attn.q_proj",
            max_abs_diff=1e-6 * 4**n,
            passed=n < 5,
            reason="" if n < 5 else text,
        )
        for n in range(8)
    ]
    tensors = LevelResult(
        level="tensor",
        status="failed",
        reason=f"decoder_model_merged logits (decode): {text}",
        figures={"outputs": 3, "failed": 1, "calls": 9, "layers": 8},
        rows=(
            tensor_row(),
            tensor_row(tensor="keep_indices", **exact),
            tensor_row(
                component="decoder_model_merged",
                tensor="logits (decode)",
                max_abs_diff=inf,
                cosine=nan,
                num_nonfinite=12,
                passed=False,
                reason=text,
            ),
            *layers,
        ),
    )
    seen = PositionsRow(
        call="decode 1", readers=4, expected=(635, 635), seen=(232.0, 232.0), passed=False,
        reason=text,
    )  # fmt: skip
    right = PositionsRow(
        call="prefill", readers=4, expected=(0, 634), seen=(0.0, 634.0), passed=True, reason=""
    )
    token = TokenRow(
        expression=text, step=2, margin=0.25, is_tie=False, reference=text, candidate=text
    )
    ended = TokenRow(
        expression="object", step=1, margin=None, is_tie=True, reference="", candidate=text
    )
    box = BoxRow(expression=text, iou=0.25, reference=(1.0, 2.0, 3.0, 4.5), candidate=None)
    levels = (
        LevelResult(level="positions", status="failed", reason=text, rows=(right, seen)),
        tensors,
        LevelResult(
            level="token",
            status="failed",
            reason="48 of 50 (96.0 %) have the reference's tokens or differ by a tie",
            figures={"questions": 50, "equal": 47, "ties": 1},
            rows=(token, ended),
        ),
        LevelResult(
            level="box",
            status="failed",
            reason="47 of 50",
            figures={"questions": 50, "mean_iou": 0.975, "share_over_95": 0.94},
            rows=(box,),
        ),
        LevelResult(
            level="task",
            status="passed",
            figures={"questions": 50, "candidate_acc_at_50": 0.9, "difference": -0.02},
        ),
    )
    divergence = Divergence(
        component="decoder_model_merged",
        call="prefill",
        tensor=f"/layers.5/self_attn/{text}",
        operator="MatMul",
        node="node_MatMul_17",
        module="layers.5.self_attn.q_proj",
        max_abs_diff=1e-3,
        allowed=1e-4,
        last_agreeing="/layers.4/mlp/add",
        cause=text,
    )
    skipped = tuple(
        LevelResult(level=level.level, status="not_run", reason="no GPU on this machine")
        for level in levels
    )
    plain: dict[str, Any] = {
        "bundle": f"/bundles/{text}",
        "model": "refshapes-llava",
        "pruner": "spatial",
        "keep_ratio": 0.3,
        "reference": "PyTorch 2.13.0 (CPU)",
        "questions": 50,
        "seed": 0,
        "backends": (
            BackendResult(
                backend="ort",
                name="ONNX Runtime 1.32.0 (CPUExecutionProvider)",
                seconds=12.5,
                levels=levels,
                divergences=(divergence,),
            ),
            BackendResult(backend="trt", name="", seconds=0.0, levels=skipped),
        ),
    }
    return CheckReport(**{**plain, **changes})


def passing_report() -> CheckReport:
    levels = (
        LevelResult(level="tensor", status="passed", figures={"outputs": 1}, rows=(tensor_row(),)),
        LevelResult(level="token", status="passed", figures={"questions": 3, "equal": 3}),
    )
    backend = BackendResult(backend="ort", name="ONNX Runtime", seconds=1.0, levels=levels)
    return check_report(backends=(backend,))
