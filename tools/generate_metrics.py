"""Write docs/metrics.md from the catalogue of metrics; `--check` only compares.

It knows nothing of who counts.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from specinfer.metrics.catalogue import GROUPS
from specinfer.metrics.metric import Kind, Label, Metric
from specinfer.metrics.vllm import VLLM
from tools.generated_file import write_or_check

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "metrics.md"
HEAD = """# Metrics

Made from `specinfer/metrics/catalogue.py` by `python tools/generate_metrics.py`; do not edit it.

| process | where |
|---|---|
| router | `GET /metrics` on the address of `--metrics`, else of `--gateway`, without a key |
| draft and verify worker | `GET /metrics` on the address of `--metrics`, off without it |

Prometheus's text format, or OpenMetrics for who asks for it: there the times of first tokens, of
requests and of rounds carry the id of a trace that a collector has. Every metric has the label
`model_name`, at workers also `tier`. A label takes the values listed here, or `other`; where only
their number is listed, those that come first have a value of their own. No metric has a prompt,
an output, a key or a session in it; `key` is the id of an API key, which is no secret.

The libraries add `process_*`: memory, processor seconds, open files and the start time.

## Often asked

The acceptance rate of guesses, and tokens a round:

    rate(specinfer_spec_decode_num_accepted_tokens_total[5m])
      / rate(specinfer_spec_decode_num_draft_tokens_total[5m])
    rate(specinfer_tokens_per_round_sum[5m]) / rate(specinfer_tokens_per_round_count[5m])

How many times faster than plain decoding the sessions are now, with the reading of their prompts
on one side only, so rather too low:

    rate(specinfer_tokens_per_round_sum[5m]) / rate(specinfer_round_duration_seconds_sum[5m])
      * on (instance, job, model_name) specinfer_plain_round_seconds

How often a guess at depth d (0 is the first) was confirmed, of the rounds that had one there:

    rate(specinfer_spec_decode_num_accepted_tokens_per_pos_total[5m])
      / rate(specinfer_spec_decode_num_drafts_per_pos_total[5m])

A round brings several tokens in one event. So three times are told apart: the time to the first
token, the gap between two events, and the mean time for a token after the first event; only the
last is what many call inter-token latency.

## vLLM's names

With `--vllm-metrics` a process shows the metrics that name one below under that name too, so that
dashboards made for vLLM show something. They are the same numbers, with `engine="0"`. It is off by
default: every histogram would be stored twice, and one Prometheus may watch a real vLLM as well.
`vllm:inter_token_latency_seconds` is the gap between events, as it is at vLLM.
"""
MAX_LISTED = 20


def main() -> int:
    """Write the file, or with `--check` say whether it is what would be written."""
    return write_or_check(TARGET, reference(), "tools/generate_metrics.py")


def reference() -> str:
    """The whole document."""
    parts = [HEAD]
    for title, metrics in GROUPS.items():
        parts.append(f"## {title}\n\n" + "\n".join(_entry(metric) for metric in metrics))
    return "\n".join(parts).rstrip() + "\n"


def _entry(metric: Metric) -> str:
    return "\n".join([f"### {metric.shown}", "", metric.help, "", *_facts(metric), ""])


def _facts(metric: Metric) -> Iterator[str]:
    where = ", ".join(metric.sources)
    yield f"- {metric.kind} of {metric.unit}, shown by: {where}"
    for label in metric.labels:
        yield f"- `{label.name}`: {_values(label)}"
    if metric.kind is Kind.HISTOGRAM:
        yield f"- buckets: {', '.join(f'{bound:g}' for bound in metric.buckets)}"
    if metric.vllm:
        total = "_total" if metric.kind is Kind.COUNTER else ""
        yield f"- for vLLM's dashboards: `{VLLM}{metric.vllm}{total}`"


def _values(label: Label) -> str:
    if not label.values:
        return f"at most {label.most} values" if label.most > 1 else "one value"
    if len(label.values) > MAX_LISTED:
        return f"{label.values[0]} to {label.values[-1]}"
    return ", ".join(label.values)


if __name__ == "__main__":
    sys.exit(main())
