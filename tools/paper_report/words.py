"""What tools/paper_table.py writes in words: tables in Markdown, and what they show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pages import interval, percent

from gap_export.spec.recipe import PublishedFigure, Recipe, list_recipes
from paper_report.measured import Measured, Row

KEEPS = (1.0, 0.5, 0.3, 0.1)
TEXT_KEEPS = (0.3, 0.1)
SHOWN_AT = 0.3
# What the paper is held to: what is left without GAP, what GAP brings back.
COLLAPSED, RECOVERED = 0.1, 0.9
PAPER = "arXiv 2506.21873"
CAPTION = "Acc@0.5 by share of visual tokens, compact ids and GAP, a panel for each pruner"


def format_model(measured: Measured) -> str:
    """Every row of one model: what it is, and its interval."""
    lines = [
        "| model | protocol | seed | pruner | keep | tokens | positions | n | Acc@0.5 "
        "| 95 % interval | of the unpruned |",
        "|---" * 11 + "|",
    ]
    for row in measured.all_rows:
        keep = "adaptive" if row["budget"] == "adaptive" else f"{row['keep_ratio']:g}"
        share = "" if row["recovered"] is None else percent(row["recovered"])
        lines.append(
            f"| {row['model']} | {row['protocol']} | {row['seed']} | {_name(row)} | {keep} "
            f"| {row['mean_visual_tokens']:.1f} | {row['positions']} | {row['n']} "
            f"| {percent(row['acc_at_50'])} | {interval(row['ci95'])} | {share} |"
        )
    return "\n".join(lines) + "\n"


def format_card(measured: Measured, *, command: str) -> str:
    """Section of a model's card."""
    return "\n".join(
        [
            f"`{command}`; every row with its interval is in `accuracy.csv`.",
            "",
            *_matrix(measured),
            "",
            f"![Acc@0.5 by share of tokens](../../docs/images/accuracy-{measured.recipe.name}.png)",
        ]
    )


def format_front(measured: Sequence[Measured]) -> str:
    """The README's table: a line for each model at keep 0.3, and the paper's figures below."""
    lines = [
        "| model | images and expressions | all tokens | 30 %, compact ids | 30 %, GAP "
        "| 30 %, GAP, best pruner |",
        "|---" * 6 + "|",
    ]
    for one in measured:
        rows = one.rows()
        whole = next(row for row in rows if row["positions"] == "none")
        at = [r for r in rows if r["budget"] == "fixed" and r["keep_ratio"] == SHOWN_AT]
        compact, gap = (
            [row["acc_at_50"] for row in at if row["positions"] == mode]
            for mode in ("compact", "gap")
        )
        best = max((r for r in at if r["positions"] == "gap"), key=lambda r: r["acc_at_50"])
        lines.append(
            f"| {one.recipe.name} | held-out RefShapes | {percent(whole['acc_at_50'])} "
            f"| {percent(sum(compact) / len(compact))} | **{percent(sum(gap) / len(gap))}** "
            f"| **{percent(best['acc_at_50'])}** (`{best['pruner']}`) |"
        )
    for recipe, figures in _published():
        whole, compact, gap = (figures[key].acc_at_50 for key in ("none", "compact", "gap"))
        lines.append(
            f"| {recipe.name} (paper) | {figures['gap'].dataset} {figures['gap'].split} "
            f"| {percent(whole)} | {percent(compact)} | **{percent(gap)}** | |"
        )
    return "\n".join(lines)


def format_summary(measured: Sequence[Measured], *, command: str) -> str:
    """The page of the paper's experiment: a matrix for each model, the paper's figures below."""
    lines = [f"`{command}`", ""]
    for one in measured:
        name = one.recipe.name
        lines += [f"## {name}", "", *_matrix(one), "", *_verdict(one), ""]
        lines += [f"![{name}: {CAPTION}](../images/accuracy-{name}.png)", ""]
    lines += ["## The paper's own figures", ""]
    lines += _paper()
    return "\n".join(lines)


def _matrix(measured: Measured) -> list[str]:
    """Pruners by shares; a cell is compact, then GAP with its interval."""
    rows = measured.rows()
    whole = next(row for row in rows if row["positions"] == "none")
    lines = [
        f"{whole['n']} held-out expressions on {whole['num_images']} images ({measured.spec}, "
        f"seed {whole['seed']}), greedy, protocol {whole['protocol']}; intervals are 95 %. "
        f"Unpruned, {whole['mean_visual_tokens']:.0f} visual tokens: "
        f"**{percent(whole['acc_at_50'])}** ({interval(whole['ci95'])}).",
        "",
        "| no token dropped | Acc@0.5 | 95 % interval |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['positions']} | {percent(row['acc_at_50'])} | {interval(row['ci95'])} |"
        for row in rows
        if row["pruner"] == "none" and row["positions"] in ("permuted", "shifted", "compact")
    ]

    def note(row: Row) -> str:
        return _of(row, whole, measured.text_of(row))

    # Of models with three position axes there is a second naive baseline.
    naive = ("compact", "text-shifted")
    naive = tuple(mode for mode in naive if any(row["positions"] == mode for row in rows))
    heads = " | ".join(f"keep {keep:g}: {' | '.join((*naive, 'GAP'))}" for keep in KEEPS[1:])
    lines += ["", f"| pruner | {heads} |", "|---" * (1 + (1 + len(naive)) * len(KEEPS[1:])) + "|"]
    for pruner in dict.fromkeys(row["pruner"] for row in rows if row["pruner"] != "none"):
        cells = []
        for keep in KEEPS[1:]:
            if not any(r["pruner"] == pruner and r["keep_ratio"] == keep for r in rows):
                cells += ["not measured"] * (1 + len(naive))
                continue
            *others, gap = (_find(rows, pruner, keep, mode) for mode in (*naive, "gap"))
            cells += [
                *(percent(other["acc_at_50"]) for other in others),
                f"**{percent(gap['acc_at_50'])}** ({interval(gap['ci95'])}{note(gap)})",
            ]
        lines.append(f"| `{pruner}` | {' | '.join(cells)} |")
    lines += _smaller_images(rows)
    return [*lines, *_all_kept(rows), *_adaptive(rows, note), *_texts(measured, whole)]


def _smaller_images(rows: list[Row]) -> list[str]:
    """The rival of pruning, of models that take any size of image."""
    found = [row for row in rows if row["positions"] == "smaller-image"]
    if not found:
        return []
    pruned = [row for row in rows if row["positions"] == "gap" and row["budget"] == "fixed"]
    lines = [
        "",
        "A smaller image, of which nothing is dropped, beside the best pruner with GAP at the "
        "nearest number of tokens:",
        "",
        "| smaller image: visual tokens | until it answers | Acc@0.5 | pruner | visual tokens "
        "| until it answers | Acc@0.5 |",
        "|---" * 7 + "|",
    ]
    whole = next(row for row in rows if row["positions"] == "none")
    for rival in found:
        tokens = rival["mean_visual_tokens"]
        least = min(abs(row["mean_visual_tokens"] - tokens) for row in pruned)
        near = [row for row in pruned if abs(row["mean_visual_tokens"] - tokens) == least]
        best = max(near, key=lambda row: row["acc_at_50"])
        lines.append(
            f"| {tokens:.0f} | {_work(rival, whole)} "
            f"| {percent(rival['acc_at_50'])} ({interval(rival['ci95'])}) "
            f"| `{best['pruner']}` | {best['mean_visual_tokens']:.0f} | {_work(best, whole)} "
            f"| **{percent(best['acc_at_50'])}** ({interval(best['ci95'])}) |"
        )
    lines += [
        "",
        "Until it answers: multiply-adds of vision encoder and prefill as a share of the unpruned "
        "ones, and their median milliseconds on this machine, expressions about one image asked "
        "together.",
    ]
    return lines


def _work(row: Row, whole: Row) -> str:
    """What a row costs until its answer begins, beside the unpruned model."""
    if row.get("gmac") is None or not whole.get("gmac"):
        return "not measured"
    return f"{percent(row['gmac'] / whole['gmac'])}, {row['first_token_ms']:.1f} ms"


def _of(row: Row, whole: Row, default: str | None) -> str:
    """How many expressions a row is of, and what it read, where that is not what a table says."""
    number = "" if row["n"] == whole["n"] else f"; n {row['n']}"
    return number if row["pruner_text"] == default else f"{number}; read the {row['pruner_text']}"


def _all_kept(rows: list[Row]) -> list[str]:
    """Pruners that rank reorder tokens at keep 1 already; the others change nothing there."""
    kept = [row for row in rows if row["pruner"] != "none" and row["keep_ratio"] == 1.0]
    found = [row for row in kept if row["budget"] == "fixed"]
    if not found:
        return []
    lines = [
        "",
        "Keep 1 drops nothing. In raster order it is the unpruned model, with either ids; pruners "
        "that let tokens enter by score permute them:",
        "",
        "| pruner | keep 1: compact | GAP |",
        "|---|---|---|",
    ]
    for pruner in dict.fromkeys(row["pruner"] for row in found):
        compact, gap = (_find(found, pruner, 1.0, mode) for mode in ("compact", "gap"))
        lines.append(
            f"| `{pruner}` | {percent(compact['acc_at_50'])} | **{percent(gap['acc_at_50'])}** |"
        )
    return lines


def _adaptive(rows: list[Row], note: Callable[[Row], str]) -> list[str]:
    found = [row for row in rows if row["budget"] == "adaptive"]
    if not found:
        return []
    lines = [
        "",
        "With `--budget adaptive` each image, and each expression, decides how many tokens stay, "
        "which are as many as stand out, and an extra one of pruners that have one:",
        "",
        "| pruner | tokens, on average | compact | GAP |",
        "|---|---|---|---|",
    ]
    for pruner in dict.fromkeys(row["pruner"] for row in found):
        compact, gap = (
            next(r for r in found if r["pruner"] == pruner and r["positions"] == mode)
            for mode in ("compact", "gap")
        )
        lines.append(
            f"| `{pruner}` | {gap['mean_visual_tokens']:.1f} | {percent(compact['acc_at_50'])} "
            f"| **{percent(gap['acc_at_50'])}** ({interval(gap['ci95'])}{note(gap)}) |"
        )
    return lines


def _texts(measured: Measured, whole: Row) -> list[str]:
    """What pruners that read the text make of the expression, and of the whole question."""
    pairs = {
        (row["pruner"], row["pruner_text"], row["keep_ratio"]): row
        for row in measured.all_rows
        if row["pruner_text"] and row["budget"] == "fixed" and row["positions"] == "gap"
    }
    pruners = list(dict.fromkeys(name for name, _, _ in pairs))
    if measured.asks_bare:
        names = ", ".join(f"`{name}`" for name in pruners)
        if measured.recipe.prompt.question is None:
            return ["", f"The prompt marks no question: {names} read the expression."]
        return ["", f"The question is the expression itself: {names} read the same by either name."]
    cells = [(text, keep) for text in ("expression", "question") for keep in TEXT_KEEPS]
    if not pruners:
        return []
    question = measured.recipe.prompt.question_template()
    heads = " | ".join(f"{text}: keep {keep:g}" for text, keep in cells)
    lines = [
        "",
        f"What is read of the text (`--pruner-text`), GAP: the expression, or the question "
        f'"{question}". Bold is the default, as the authors of the pruner have it; the tower of '
        "this model was trained on expressions alone:",
        "",
        f"| pruner | {heads} |",
        "|---" * (1 + len(cells)) + "|",
    ]
    for name in pruners:
        texts = []
        for cell in cells:
            row = pairs.get((name, *cell))
            if row is None:
                texts.append("not measured")
                continue
            mark = "**" if row["pruner_text"] == measured.text_of(row) else ""
            span = f"{interval(row['ci95'])}{_of(row, whole, row['pruner_text'])}"
            texts.append(f"{mark}{percent(row['acc_at_50'])}{mark} ({span})")
        lines.append(f"| `{name}` | {' | '.join(texts)} |")
    return lines


def _name(row: Row) -> str:
    text = row["pruner_text"]
    return row["pruner"] if text is None else f"{row['pruner']} ({text})"


def _verdict(measured: Measured) -> list[str]:
    """What the rows at keep 0.3 show, and what they do not."""
    rows = [row for row in measured.rows() if row["budget"] == "fixed"]
    at = [row for row in rows if row["keep_ratio"] == SHOWN_AT]
    compact, gap = ([r for r in at if r["positions"] == mode] for mode in ("compact", "gap"))
    worst = max(compact, key=lambda row: row["recovered"])
    best = max(gap, key=lambda row: row["recovered"])
    pairs = [(c, g) for g in gap for c in compact if c["pruner"] == g["pruner"]]
    apart = sum(g["ci95"][0] > c["ci95"][1] for c, g in pairs)
    reached = [row["pruner"] for row in gap if row["recovered"] >= RECOVERED]
    lines = [
        f"At keep {SHOWN_AT:g} compact ids leave at most {percent(worst['recovered'])} of the "
        f"unpruned accuracy (`{worst['pruner']}`; "
        f"{'not more' if worst['recovered'] <= COLLAPSED else 'more'} than a tenth). GAP brings "
        f"back {percent(best['recovered'])} with the best pruner (`{best['pruner']}`), and at "
        f"least {percent(RECOVERED)} with {len(reached)} of {len(gap)}"
        + (f" ({', '.join(f'`{name}`' for name in reached)})" if reached else "")
        + f"; the intervals of compact and GAP do not overlap for {apart} of {len(pairs)} pruners.",
    ]
    behind = [
        f"`{row['pruner']}` at keep {row['keep_ratio']:g}"
        for row in rows
        if row["positions"] == "gap"
        and row["keep_ratio"] in KEEPS[1:]
        and row["acc_at_50"]
        <= _find(rows, row["pruner"], row["keep_ratio"], "compact")["acc_at_50"]
    ]
    lines.append(
        "GAP is ahead of compact ids in every row and column."
        if not behind
        else f"GAP is not ahead of compact ids for {', '.join(behind)}."
    )
    return lines


def _paper() -> list[str]:
    """The paper's figures, where its text or notes on it give them."""
    lines = [
        "Beside them the paper's figures, of full-size models on RefCOCO; which pruner and how "
        "many tokens they are of is not known:",
        "",
        "| model | data | unpruned | compact | GAP | compact, of the unpruned | GAP, of it "
        "| source |",
        "|---" * 8 + "|",
    ]
    for recipe, found in _published():
        whole, compact, gap = (found[key].acc_at_50 for key in ("none", "compact", "gap"))
        first = found["gap"]
        lines.append(
            f"| {recipe.name} | {first.dataset} {first.split} | {percent(whole)} "
            f"| {percent(compact)} | **{percent(gap)}** | {percent(compact / whole)} "
            f"| {percent(gap / whole)} | {first.source} |"
        )
    return lines


def _published() -> list[tuple[Recipe, dict[str, PublishedFigure]]]:
    """Models of which the paper has all three figures, and these by their positions."""
    found = []
    for recipe, _ in list_recipes():
        figures: dict[str, PublishedFigure] = {
            figure.positions: figure for figure in recipe.published if PAPER in figure.source
        }
        if set(figures) == {"none", "compact", "gap"}:
            found.append((recipe, figures))
    return found


def _find(rows: list[Row], pruner: str, keep: float, positions: str) -> Row:
    return next(
        row
        for row in rows
        if row["pruner"] == pruner
        and row["keep_ratio"] == keep
        and row["positions"] == positions
        and row["budget"] == "fixed"
    )
