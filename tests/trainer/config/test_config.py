"""Settings: strict, with presets, stages and overrides; every error says what and where."""

import re

import pytest

from dgrpo.trainer.config import PRESETS, Method, RunSettings, describe, dump, load, validate
from dgrpo.trainer.config.settings import Settings

BASE = {
    "model": {"name": "student"},
    "teacher": {"name": "teacher"},
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "steps": 10,
}
FLAGS = ["model.name=m", "teacher.name=t", "data.sources=[{path: x.jsonl}]", "steps=10"]


def changed(**groups):
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for group, values in groups.items():
        tree[group] = {**tree.get(group, {}), **values} if isinstance(values, dict) else values
    return tree


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    settings = validate(changed(method={"preset": name}))
    for key, value in PRESETS[name].items():
        shown = settings.method.model_dump()[key]
        assert shown == (value if not isinstance(value, dict) else {**value, "steps": None})


def test_default_is_the_published_dgrpo():
    settings = validate(BASE)
    method, rollout = settings.method, settings.rollout
    assert (method.teacher_coef, method.divergence, method.ref_coef) == (0.5, "reverse_kl", 0.0)
    assert (method.clip_low, method.clip_high, rollout.group_size) == (0.2, 0.2, 8)


def test_a_value_wins_over_its_preset():
    method = validate(changed(method={"preset": "opd", "teacher_coef": 0.25})).method
    assert method.teacher_coef == 0.25 and method.advantage == "none"


def test_settings_are_frozen():
    settings = validate(BASE)
    with pytest.raises(ValueError, match="frozen"):
        settings.steps = 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimiser.lr=1", "optimiser: unknown setting, did you mean optimizer?"),
        ("lr=1", "lr: unknown setting, did you mean optimizer.lr?"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown setting, did you mean optimizer.lr?"),
        ("method.beta_teacher=1", "method.beta_teacher: unknown setting"),
        ("data.sources=[{path: x, pth: y}]", "did you mean data.sources.path?"),
        ("batch.prompts=many", "batch.prompts: got 'many', expected a valid integer"),
        ("optimizer.lr=-1", "optimizer.lr: got -1, expected greater than 0"),
        ("method.preset=gpro", "method.preset: got 'gpro', expected 'sft', 'kd'"),
        ("method.teacher_coef={start: 1}", "method.teacher_coef.end: missing"),
        ("optimizer.lr", "override: got 'optimizer.lr', expected key=value"),
        ("model.config={model_type: qwen3}", "model.name: got both it and model.config"),
        ("teacher.name=null", "teacher.name: got null"),
        ("data.sources=[]", "data.sources: got none"),
    ],
)
def test_bad_input_names_the_setting_and_the_way_out(override, message):
    with pytest.raises(ValueError) as error:
        load(None, [*FLAGS, override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"teacher": "none"}}, "method.teacher_coef"),
        ({"method": {"teacher": "self"}}, "method.teacher_context"),
        ({"method": {"preset": "sft", "advantage": "group"}}, "method.advantage"),
        ({"method": {"preset": "kd", "gate": "wrong"}}, "method.gate"),
        (
            {
                "method": {"preset": "opd", "teacher": "served"},
                "teacher": {"url": "http://localhost", "name": "t", "temperature": 2.0},
            },
            "teacher.temperature",
        ),
        ({"method": {"preset": "grpo", "advantage": "none"}}, "there would be no loss"),
        ({"method": {"divergence": "clipped_forward_kl"}}, "method.divergence_clip"),
        ({"method": {"divergence_clip": 1.0}}, "method.divergence_clip"),
        ({"method": {"old_logprobs": "none"}, "batch": {"updates": 2}}, "method.old_logprobs"),
        ({"batch": {"updates": 20}}, "batch.updates"),
        ({"model": {**BASE["model"], "lora": {"dropout": 0.1}}}, "model.lora.dropout"),
        ({"rollout": {"group_size": 1}}, "rollout.group_size"),
        ({"steps": None, "epochs": None}, "steps: got null"),
        ({"steps": None, "optimizer": {"decay": "cosine"}}, "optimizer.decay"),
        ({"method": {"teacher": "served"}}, "teacher.url"),
        ({"method": {"importance": "truncate", "old_logprobs": "sampler"}}, "method.importance"),
        ({"model": {"name": None, "config": {"hidden_size": 8}}}, "model_type"),
        ({"steps": None, "method": {"entropy_coef": {"start": 1.0, "end": 0.0}}}, "entropy_coef."),
        ({"log": {"profile_steps": [5, 2]}}, "log.profile_steps: got [5, 2]"),
    ],
)
def test_rules_between_settings(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(changed(**changes))


def test_scientific_numbers_are_numbers():
    assert load(None, [*FLAGS, "optimizer.lr=1e-6"])[""].optimizer.lr == 1e-6
    assert load(None, [*FLAGS, "batch.prompts=12"])[""].batch.prompts == 12


def test_written_settings_are_read_back(tmp_path):
    settings = validate(changed(method={"preset": "kdrl"}))
    (tmp_path / "settings.yaml").write_text(dump(settings))
    assert load(tmp_path / "settings.yaml")[""] == settings


@pytest.fixture
def staged(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        """
        out: runs/two
        model: {name: student, lora: {rank: 4}}
        teacher: {name: teacher}
        data: {sources: [{path: rows.jsonl}]}
        optimizer: {lr: 1e-6}
        stages:
          - {name: sft, epochs: 2, method: {preset: sft}, optimizer: {lr: 1e-5}}
          - {name: dgrpo, method: {preset: dgrpo}, batch: {prompts: 8}}
        """
    )
    return path


def test_stages_lay_over_the_file(staged):
    stages = load(staged)
    sft, dgrpo = stages["sft"], stages["dgrpo"]
    assert (sft.out, sft.epochs, sft.optimizer.lr) == ("runs/two/sft", 2, 1e-5)
    assert (dgrpo.out, dgrpo.epochs, dgrpo.optimizer.lr) == ("runs/two/dgrpo", 1, 1e-6)
    assert dgrpo.model.name == "runs/two/sft/export" and dgrpo.model.lora.rank == 4
    assert list(load(staged, stage="dgrpo")) == ["dgrpo"]


def test_overrides_reach_stages(staged):
    stages = load(staged, ["optimizer.lr=1e-4", "stages.dgrpo.batch.prompts=4"])
    assert [s.optimizer.lr for s in stages.values()] == [1e-4, 1e-4]
    assert stages["dgrpo"].batch.prompts == 4 and stages["sft"].batch.prompts == 16


def test_an_override_that_no_stage_would_see_is_refused(staged):
    with pytest.raises(ValueError, match=r"write stages\.NAME\.method\.clip_low=0\.3"):
        load(staged, ["method.clip_low=0.3"])


def test_a_stage_names_an_earlier_model(staged):
    text = staged.read_text().replace("name: dgrpo,", 'name: dgrpo, teacher: {name: "stage:sft"},')
    staged.write_text(text)
    assert load(staged)["dgrpo"].teacher.name == "runs/two/sft/export"
    staged.write_text(text.replace("stage:sft", "stage:later"))
    with pytest.raises(ValueError, match=r"teacher\.name: got 'stage:later', expected an earlier"):
        load(staged)


def test_errors_in_a_stage_name_it(staged):
    with pytest.raises(ValueError, match=r"stages\.sft\.optimizer\.lr: got 'x'"):
        load(staged, ["stages.sft.optimizer.lr=x"])
    with pytest.raises(ValueError, match=r"expected one of \['sft', 'dgrpo'\]"):
        load(staged, stage="other")


def test_a_stage_of_a_file_without_stages(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("model: {name: student}")
    with pytest.raises(ValueError, match=r"plain\.yaml has no stages; leave --stage out"):
        load(path, FLAGS, stage="sft")
    with pytest.raises(ValueError, match="but the command has no stages"):
        load(None, FLAGS, stage="sft")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(range(128, 256)), "which is no text in UTF-8 (byte 0: 0x80)"),
        (b"PK\x03\x04\x00\x00", "which is not YAML: unacceptable character #x0003"),
        (b"a: [1\nb: 2\n", "which is not YAML: while parsing a flow sequence"),
        (b"- 1\n", "which holds a list, expected keys and values"),
        (None, "which is a folder, expected a file"),
    ],
    ids=["latin", "zip", "open bracket", "list", "folder"],
)
def test_a_file_that_is_no_settings_file_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "odd.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"settings file: got '{path}', {message}")) as e:
        load(path)
    assert "\n" not in str(e.value)


def test_every_setting_has_one_line_of_help():
    for setting in describe():
        assert setting.help and "\n" not in setting.help and len(setting.help) < 100, setting.name
        assert setting.help.endswith("."), setting.name


def test_defaults_obey_their_own_bounds():
    def groups(kind):
        for field in kind.model_fields.values():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Settings):
                yield inner
                yield from groups(inner)

    for kind in groups(RunSettings):
        values = kind().model_dump()
        assert kind.model_validate(values).model_dump() == values, kind


def test_an_unknown_preset_value_is_not_silently_kept():
    with pytest.raises(ValueError, match="teacher_coeff"):
        Method.model_validate({"preset": "dgrpo", "teacher_coeff": 1.0})
