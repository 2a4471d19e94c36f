"""Scores by EleutherAI's lm-eval, where it is installed."""

from collections.abc import Sequence

from dgrpo.longblocks.evaluation.intervals import Interval


def lm_eval_scores(
    model: str, tasks: Sequence[str], *, limit: int | None = None, batch_size: int = 8, **options
) -> dict[str, Interval]:
    """Score a Hugging Face model on tasks of lm-eval (`gsm8k`, `mmlu_pro`, `ifeval`).

    Returns `"task/metric"` to mean and 95 % interval by lm-eval's standard error. `limit` is the
    number of items per task, `options` are more model arguments of lm-eval (`dtype="bfloat16"`).
    Raises ValueError where lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
    except ImportError:
        raise ValueError(
            "lm_eval: it is not installed; pip install lm-eval, or load the files of the data set "
            "with dgrpo.longblocks.evaluation.load_gsm8k, load_mmlu_pro or load_ifeval"
        ) from None
    arguments = ",".join(f"{k}={v}" for k, v in {"pretrained": model, **options}.items())
    found = simple_evaluate(
        model="hf", model_args=arguments, tasks=list(tasks), limit=limit, batch_size=batch_size
    )
    scores, counts = {}, found.get("n-samples", {})
    for task, metrics in found["results"].items():
        n = counts.get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            name, _, kind = key.partition(",")
            if isinstance(value, int | float) and not name.endswith("_stderr") and name != "alias":
                error = metrics.get(f"{name}_stderr,{kind}", 0.0)
                half = 1.96 * error if isinstance(error, int | float) else 0.0
                label = f"{task}/{name}" + (f" ({kind})" if kind not in ("", "none") else "")
                scores[label] = Interval(value, value - half, value + half, n)
    return scores
