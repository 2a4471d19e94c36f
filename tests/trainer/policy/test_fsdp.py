"""FSDP2 against one process, on gloo: 2 ranks by default, 4 as slow tests.

All cases of a world size run in one group of processes; `fsdp_cases.py` is what they run.
"""

import copy
import time

import pytest
import torch
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException

from dgrpo.distributed import leave, make_mesh, start
from dgrpo.trainer.batch import pack
from dgrpo.trainer.policy import PolicyModel, fsdp
from tests.tiny import make_samples, relative, tiny_model, tiny_pair
from tests.trainer.policy import fsdp_cases

EQUAL = (
    "untied",
    "tied",
    "biased_head",
    "window_softcap",
    "teacher_untied",
    "teacher_tied",
    "gspo_sharded_teacher",
    "gspo_tied_teacher",
    "rank_without_samples",
    "no_sync",
    "hsdp",
    "hsdp_no_sync",
    "checkpointed",
    "checkpointed_gspo",
    "lora",
    "lora_head",
    "lora_tied_head",
)


def run(world, folder, limit=300):
    """The results of every rank: {case: numbers, or a traceback}."""
    context = mp.start_processes(
        fsdp_cases.worker,
        args=(world, str(folder / "store"), str(folder)),
        nprocs=world,
        join=False,
        start_method="spawn",
    )
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end and not context.join(timeout=5):
            pass
    except ProcessException as error:
        print(error)  # what the ranks saved says more
    finally:
        for process in context.processes:
            process.kill()
    files = [folder / f"{rank}.pt" for rank in range(world)]
    return [torch.load(file, weights_only=True) if file.exists() else {} for file in files]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(4, tmp_path_factory.mktemp("four"))


def of(ranks, case):
    """The numbers of a case, by rank."""
    for rank, results in enumerate(ranks):
        got = results.get(case, "did not run: a case before it failed or hung")
        assert isinstance(got, dict), f"rank {rank}: {got}"
    return [results[case] for results in ranks]


def assert_equal(results):
    for got in results:
        assert got["loss"] < 1e-5
        assert got["gradients"] < 1e-5
        assert got["norm"] < 1e-5 and got["clipped"] < 1e-5
        assert got["parameters"] < 1e-5 and got["merged"] < 1e-5


def assert_sampled(results, counts):
    assert [got["count"] for got in results] == counts
    for got in results:
        assert got["tokens"] and got["logprobs"] < 1e-5
        assert got["sharded"] and got["training"] and got["finite"]
        assert got["gradients"] < 1e-5


@pytest.mark.parametrize("case", EQUAL)
def test_two_ranks_equal_one_process(two, case):
    assert_equal(of(two, case))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["untied", "tied", "gspo_sharded_teacher", "hsdp"])
def test_four_ranks_equal_one_process(four, case):
    assert_equal(of(four, case))


def test_bf16_leaves_the_inputs_of_the_loss_bitwise(two):
    for got in of(two, "inputs"):
        assert got == {"changed": 0, "bf16": True, "masters": True, "fp32_gradients": True}
    for control in of(two, "inputs_control"):
        assert control["changed"] == 3  # what FSDP does to them by default


def test_bf16_is_as_close_as_rounded_parameters_are(two):
    for got in of(two, "bf16"):
        assert got["loss"] < 1e-3
        assert 1e-4 < got["gradients"] < 1.2 * got["plain"]


def test_ranks_sample_different_prompts_and_lengths(two):
    assert_sampled(of(two, "sampling"), [0, 2])
    assert_sampled(of(two, "sampling_untied"), [4, 6])


@pytest.mark.slow
def test_four_ranks_sample_different_prompts_and_lengths(four):
    assert_sampled(of(four, "sampling"), [0, 2, 4, 6])


@pytest.mark.parametrize("case", ["self_teacher", "self_teacher_tied"])
def test_the_policy_can_teach_itself(two, case):
    for got in of(two, case):
        assert max(got["loss"], got["loss_gspo"], got["gradients"]) < 1e-5


def test_a_sharded_teacher_reads_as_one_process(two):
    for got in of(two, "teacher_states"):
        assert got.pop("resharded")
        assert max(got.values()) < 1e-6


def test_all_ranks_see_a_gradient_that_is_not_finite(two):
    assert of(two, "non_finite") == [{"finite": False, "untouched": True}] * 2


def test_adapters_are_fp32_on_a_bf16_model(two):
    assert of(two, "lora_mixed") == [{"finite": True, "adapters": True, "fp32": True}] * 2


# One process.


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield start("cpu")
    leave()


def loss_of(policy):
    (micro,) = pack(make_samples([(3, 5), (4, 8)]), 100)
    loss = policy(micro, inputs=micro.head_inputs()).loss
    loss.backward()
    return loss.detach()


def test_one_process_can_shard_too(alone):
    mesh = make_mesh(alone)
    policy, _ = tiny_pair("qwen3")
    single, _ = tiny_pair("qwen3")
    fsdp.shard(policy, mesh)
    assert mesh.size() == 1 and policy.device.type == "cpu"
    assert loss_of(policy) == loss_of(single)
    assert relative(fsdp.grad_norm(policy), fsdp.grad_norm(single)) < 1e-6


def test_bad_sharding_raises(alone):
    mesh = make_mesh(alone)
    policy, _ = tiny_pair("llama")
    with pytest.raises(ValueError, match="cpu_offload: got True on a CPU mesh"):
        fsdp.shard(policy, mesh, cpu_offload=True)
    fsdp.shard(policy, mesh)
    with pytest.raises(ValueError, match="model: got one that is sharded already"):
        fsdp.shard(policy, mesh)


def test_clipping_without_shards_is_torchs():
    policy, _ = tiny_pair("llama")
    loss_of(policy)
    other = copy.deepcopy(policy)
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    limit = 0.3 * float(fsdp.grad_norm(policy))
    norm = fsdp.clip_gradients(policy, limit)
    assert relative(norm, torch.nn.utils.clip_grad_norm_(other.parameters(), limit)) < 1e-6
    for ours, theirs in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    before = [p.grad.clone() for p in policy.parameters()]
    fsdp.clip_gradients(policy, 10.0)  # far above the norm
    assert all(torch.equal(a, p.grad) for a, p in zip(before, policy.parameters(), strict=True))


def test_a_model_without_gradients_has_norm_zero():
    policy, _ = tiny_pair("llama")
    assert fsdp.grad_norm(policy) == 0
    fsdp.sync_gradients(policy, last=True)


def test_checkpointed_layers_keep_their_inputs_alone():
    saved, losses = [], []
    for checkpointed in (False, True):
        policy, _ = tiny_pair("qwen3")
        if checkpointed:
            fsdp.checkpoint_layers(policy)
        policy.train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            losses.append(loss_of(policy))
        saved.append(sum(sizes))
    assert losses[0] == losses[1]
    assert saved[1] < 0.5 * saved[0]


def test_a_copy_of_checkpointed_layers_has_its_own_weights():
    policy, _ = tiny_pair("qwen3")
    fsdp.checkpoint_layers(policy)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for layer in other.layers:
            layer.mlp.down_proj.weight.zero_()
    assert loss_of(other) != loss_of(policy)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_rotary_buffers_are_computed_again(kind):
    policy, _ = tiny_pair(kind)
    want = {n: b.clone() for n, b in policy.named_buffers() if "inv_freq" in n}
    policy.to(torch.bfloat16)
    rounded = {n: b for n, b in policy.named_buffers() if "inv_freq" in n}
    assert want and not any(torch.equal(rounded[n].float(), want[n]) for n in want)
    fsdp.reset_rotary(policy)
    got = {n: b for n, b in policy.named_buffers() if "inv_freq" in n}
    assert all(torch.equal(got[n], want[n]) for n in want)
    assert all(".inv_freq" not in name for name in policy.state_dict())


def test_full_tensors_are_the_models_own():
    model = tiny_model("qwen3")
    want = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}  # tied
    got = dict(fsdp.full_tensors(PolicyModel(model)))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[n], t) and not got[n].requires_grad for n, t in want.items())
    half = dict(fsdp.full_tensors(PolicyModel(tiny_model("qwen3")), dtype=torch.bfloat16))
    assert all(torch.equal(half[n], t.bfloat16()) for n, t in want.items())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # untied and tied
def test_full_tensors_merge_lora_as_peft_does(kind):
    policy, plain = tiny_pair(kind, lora=["q_proj", "lm_head"])
    want = plain.merge_and_unload().state_dict()
    got = dict(fsdp.full_tensors(policy))
    assert got.keys() == want.keys()
    for name in set(want) - {"model.embed_tokens.weight"}:
        assert relative(got[name], want[name]) < 1e-6, name
    embedding = policy.causal.get_input_embeddings().weight
    assert torch.equal(got["model.embed_tokens.weight"], embedding)
    raw = dict(fsdp.full_tensors(policy, merge=False))
    assert sum("lora_" in name for name in raw) == 2 * (2 + 1)


def test_adapters_that_cannot_be_merged_raise():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    policy = PolicyModel(get_peft_model(tiny_model("llama"), config))
    with pytest.raises(ValueError, match="model: got an adapter on Embedding"):
        dict(fsdp.full_tensors(policy))
