"""Folders of runs for the report, and the data of its page."""

import gzip
import json
import re

EVIL = "</script><script>document.title='broken'</script><!-- <b>\u2028 & é 🙂"


def rollout(step, group=0, index=0, text=("a", " b\n"), **values):
    count = len(text)
    record = {
        "step": step,
        "group": group,
        "index": index,
        "prompt": EVIL,
        "prompt_tokens": 3,
        "tokens": list(range(count)),
        "text": list(text),
        "reward": 0.5,
        "advantage": -1,
        "divergence": [0.25 * i for i in range(count)],
        "clipped": [i % 2 for i in range(count)],
    }
    return record | values


def write_run(folder, steps, rollouts=(), tail=""):
    (folder / "rollouts").mkdir(parents=True)
    lines = [
        json.dumps({"step": s, "loss": 1 / s, "reward": s / 10, "time/step": 2.0}) for s in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
    for record in rollouts:
        path = folder / f"rollouts/step-{record['step']:08d}-00000.jsonl.gz"
        with gzip.open(path, "at") as file:
            file.write(json.dumps(record) + "\n")


def data_of(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)
