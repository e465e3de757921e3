"""An estimate becomes lines for a person (`report`) or values for a program (`as_values`)."""

from __future__ import annotations

from typing import Any

from complete_fn.engines.prices import amount, at_prices
from complete_fn.estimates.estimate import CachedShare, Estimate, TokenCount
from complete_fn.tokens import BYTES_PER_TOKEN
from complete_fn.types import Usage


def report(e: Estimate) -> str:
    """The estimate as lines, one fact per line, in the order in which a run comes to them."""
    prices = e.call.model.prices
    paid_input = amount(prices, Usage(prompt_tokens=e.tokens.total))
    rows = f"{e.rows:,}" + (f" ({e.nulls:,} NULL: no answer, no cost)" if e.nulls else "")
    lines = [
        ("rows", rows),
        ("distinct", f"{e.distinct:,}"),
        ("known answers", f"{e.known:,} rows"),
        ("to compute", f"{e.tokens.prompts:,} prompts with {e.call.model.name}"),
        ("order", order_line(e)),
        ("input tokens", input_line(e.tokens)),
        ("cached", cached_line(e.cached, e.tokens.total)),
        ("output tokens", f"at most {e.output:,} ({e.limit:,} each)" + answers_line(e)),
        ("price", f"at most {prices.currency} {e.most:.6f} (input {paid_input:.6f}) {at_prices(prices.basis)}"),
        ("likely", f"{prices.currency} {e.price:.6f}{basis(e)}"),
        ("time", time_line(e)),
    ]
    if e.cap is not None:
        fits = "covers" if e.most <= e.cap else "may not cover"
        lines.append(("max cost", f"{prices.currency} {e.cap} {fits} it"))
    if e.token_cap is not None:
        fits = "cover" if e.tokens.total + e.output <= e.token_cap else "may not cover"
        lines.append(("max tokens", f"{e.token_cap:,} {fits} it"))
    return "\n".join(f"{name:15}{text}" for name, text in lines)


def order_line(e: Estimate) -> str:
    moved = f", {e.reordered:,} rows with their fields reordered" if e.reordered else ""
    return f"by common beginnings{moved}"


def input_line(t: TokenCount) -> str:
    if t.margin is None:
        return f"about {t.total:,}, from {BYTES_PER_TOKEN} bytes a token: this model's tokenizer is not on this machine"
    how = "all counted" if not t.margin and t.counted == t.prompts else ""
    if not how:
        how = f"±{t.margin:,} at 95 %, {t.counted:,} of {t.prompts:,} prompts counted"
    template = "without the chat template" if t.template is None else f"{t.template} a prompt for the chat template"
    return f"{t.total:,} ({how}; {template})"


def cached_line(c: CachedShare | None, total: int) -> str:
    if c is None:
        return "not known: the cache is the endpoint's, or this model's tokenizer is not on this machine"
    share = c.total / total if total else 0.0
    margin = f", ±{c.margin:,} at 95 %" if c.margin else ""
    return f"{c.total:,} of them ({share:.0%}{margin}), in blocks of {c.block}, if the engine's cache is empty"


def answers_line(e: Estimate) -> str:
    if e.answers is None:
        return ""
    whose = "past answers to this instruction" if e.answers.same else "past answers of this model"
    a = e.answers
    return f", about {e.likely.completion_tokens:,} by {a.rows:,} {whose} ({a.mean:.1f} ± {a.margin:.1f} each)"


def basis(e: Estimate) -> str:
    missing = []
    if e.answers is None:
        missing.append("every answer as long as it may be")
    if e.cached is None:
        missing.append("nothing cached")
    return f", with {' and '.join(missing)}" if missing else ""


def time_line(e: Estimate) -> str:
    if e.rates is None or e.seconds is None or e.clock_seconds is None:
        return "not known: no run of this model has been measured here"
    fresh, _, output, _ = e.rates.seconds
    speeds = [f"{1 / s:,.0f} tokens/s {way}" for s, way in ((fresh, "in"), (output, "out")) if s > 0]
    by = f"{e.rates.runs:,} past runs on {e.rates.device}"
    how_long = f"{e.clock_seconds:,.1f} s, {e.seconds:,.1f} device-seconds"
    return f"{how_long} by {by} ({', '.join(speeds)}); the engine's start comes on top"


def as_values(e: Estimate) -> dict[str, Any]:
    """The estimate for a program. Money is decimal text; None means not known."""
    prices, likely = e.call.model.prices, e.likely
    return {
        "model": e.call.model.name,
        "rows": e.rows,
        "nulls": e.nulls,
        "distinct": e.distinct,
        "known_rows": e.known,
        "reordered_rows": e.reordered,
        "prompts": e.tokens.prompts,
        "prompt_tokens": e.tokens.total,
        "prompt_tokens_margin": e.tokens.margin,
        "cached_tokens": None if e.cached is None else e.cached.total,
        "cached_tokens_margin": None if e.cached is None else e.cached.margin,
        "completion_tokens": likely.completion_tokens,
        "completion_tokens_at_most": e.output,
        "completion_tokens_basis": "bound" if e.answers is None else "instruction" if e.answers.same else "model",
        "cost": str(e.price),
        "cost_at_most": str(e.most),
        "currency": prices.currency,
        "price_basis": prices.basis,
        "seconds": e.clock_seconds,
        "device_seconds": e.seconds,
        "device": None if e.rates is None else e.rates.device,
    }
