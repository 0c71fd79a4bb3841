"""A woven model's state has the names of its base, for the tools that know only those."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

import prw

X = torch.linspace(-2, 2, 4 * 8).sin().reshape(4, 8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8)))


def woven(seed: int = 1, **fields: Any) -> tuple[nn.Sequential, prw.Weave]:
    model = net()
    fields = {"target_modules": ["0", "2.0"], "rank": 2} | fields
    weave = prw.weave(model, prw.Config(**fields))
    torch.manual_seed(seed)
    for name in ("one", "two"):
        weave.unlock(name)
        for parameter in weave.parameters():
            nn.init.normal_(parameter)
    weave.call(noisy=False)
    return model, weave


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(whole(tensor), whole(other[name])) for name, tensor in one.items()
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModel"])
def test_what_save_pretrained_writes_is_the_base(tmp_path: Path, kind: str, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")

    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32}
        more = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = transformers.LlamaConfig(**sizes, **more, tie_word_embeddings=tied)
        return transformers.LlamaForCausalLM(config)

    model, base = llama(), llama()
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    weave = prw.weave(model, prw.Config(target_modules=targets, rank=2, share_router="parent"))
    weave.unlock("one")
    model.save_pretrained(tmp_path)
    loader = getattr(transformers, kind)
    again, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    wanted = base if kind == "AutoModelForCausalLM" else base.model
    assert same(again.state_dict(), wanted.state_dict())
    assert not info["missing_keys"] and not info["mismatched_keys"]
    body = set(info["unexpected_keys"]) - {"lm_head.weight"}
    assert all(".owned_pool." in name for name in body), "the experts, which only prw.load reads"


@pytest.mark.parametrize("share_router", ["module", "parent"])
def test_names_and_order_are_those_of_the_base(share_router: str) -> None:
    model, weave = woven(share_router=share_router)
    names = [name for name in model.state_dict() if "owned_pool" not in name]
    assert names == list(net().state_dict())
    twin, _ = woven(seed=2, share_router=share_router)
    twin.load_state_dict(model.state_dict())
    assert same(twin.state_dict(), model.state_dict()) and torch.equal(twin(X), model(X))
    older = {
        name.replace("weight", "base.weight").replace("bias", "base.bias"): tensor + 1
        for name, tensor in model.state_dict().items()
    }
    twin.load_state_dict(older)
    assert all(torch.equal(t, model.state_dict()[n] + 1) for n, t in twin.state_dict().items())
    weave.unload()
    assert same(model.state_dict(), net().state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_bare_state_replaces_the_base_only(assign: bool) -> None:
    model, weave = woven()
    kept = [(parameter, parameter.clone()) for parameter in weave.parameters()]
    bare = {name: tensor.clone() + 1 for name, tensor in net().state_dict().items()}
    model.load_state_dict(bare, assign=assign)
    assert all(p is old for p, (old, _) in zip(weave.parameters(), kept, strict=True))
    assert all(torch.equal(parameter, value) for parameter, value in kept)
    with pytest.raises(RuntimeError, match="Missing key.*0.base.weight"):
        model.load_state_dict({n: t for n, t in bare.items() if n != "0.weight"})
    part = {n: t for n, t in model.state_dict().items() if ".experts.1." not in n}
    with pytest.raises(RuntimeError, match=r"Missing key.*0.owned_pool.experts.1.A.0"):
        model.load_state_dict(part)
    weave.unload()
    assert same(model.state_dict(), bare)
    with pytest.raises(RuntimeError, match="Unexpected key.*owned_pool"):
        model.load_state_dict(woven()[0].state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_and_compiled_models(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = woven()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = duplicate(model)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert same(model.state_dict(), state) and not same(twin.state_dict(), state)
    twin.load_state_dict(state)
    assert same(twin.state_dict(), state)
    compiled = torch.compile(woven(seed=3)[0], backend="eager")
    compiled.load_state_dict({f"_orig_mod.{name}": t for name, t in state.items()})
    assert same(get_model_state_dict(compiled), state)


def test_accelerate_keeps_the_experts(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, weave = woven()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model, _ = accelerator.prepare(model, torch.optim.AdamW(weave.parameters()))
    accelerator.save_state(tmp_path)
    for parameter in model.parameters():
        parameter.data.zero_()
    accelerator.load_state(tmp_path)
    assert same(accelerator.unwrap_model(model).state_dict(), state)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.usefixtures("alone")
def test_distributed_checkpoints_know_the_names(full: bool) -> None:
    options = StateDictOptions(full_state_dict=full, broadcast_from_rank0=full)
    state = {name: tensor.clone() for name, tensor in woven()[0].state_dict().items()}

    def sharded(seed: int) -> nn.Module:
        model, weave = woven(seed)
        routed = prw.distributed.routed_parameters(weave)
        for part in (model[0], model[2], model):
            fully_shard(part, ignored_params=routed)
        return model

    found = get_model_state_dict(sharded(1), options=options)
    assert same(found, state)
    twin = sharded(4)
    set_model_state_dict(twin, found, options=options)
    assert same(twin.state_dict(), state)
    wrapped = nn.parallel.DistributedDataParallel(woven(5)[0])
    set_model_state_dict(wrapped, dict(state))  # it renames what it is given
    assert same(get_model_state_dict(wrapped), state)
