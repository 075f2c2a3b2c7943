"""Every converter against a small transformers model of its family: modules, norms, fused rows, checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CASES, FAMILIES, build
from pico import PICO, pico_config, pico_model, pico_tokenizer, save_backbone
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its usual name)
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D
from versions import needs

from peft_lorasuite.arch.layout import group_of, join, split
from peft_lorasuite.arch.registry import architecture
from peft_lorasuite.arch.spec import OUTPUT_PROJECTIONS, Architecture
from peft_lorasuite.models.backbone import Backbone

INTERFACES = {
    "gptj": ("5.24", "the attention interface of GPT-J"),
    "stablelm": ("5.0", "the attention interface of StableLM"),
}
IDS = torch.tensor([[1, 17, 40, 3, 99, 58, 7, 110]])


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return left.shape == right.shape and bool((left - right).abs().max() <= tolerance * (1 + right.abs().max()))


@FAMILIES
def test_the_sites_are_the_linear_modules_of_every_layer(case: int) -> None:
    model, arch = build(case)
    layers = model.get_submodule(arch.layer_path)
    assert len(layers) == arch.layers
    for number, layer in enumerate(layers):
        linear = {name: part for name, part in layer.named_modules() if isinstance(part, nn.Linear | Conv1D)}
        sites = [site for site in arch.sites if site.is_in(number)]
        assert {name for name in linear if not name.startswith("linear_attn.")} == {site.path for site in sites}
        for site in sites:
            module = linear[site.path]
            weight = module.weight.T if site.conv1d else module.weight
            shapes = [arch.in_layer(number).shape(part) for part in site.parts]
            assert tuple(weight.shape) == (sum(rows for rows, _ in shapes), shapes[0][1])
            assert (module.bias is not None) == site.bias
            assert isinstance(module, Conv1D) == site.conv1d


@FAMILIES
def test_norms_embedding_and_head_have_the_paths_of_the_architecture(case: int) -> None:
    model, arch = build(case)
    embedding, head = model.get_submodule(arch.embedding), model.get_submodule(arch.head)
    assert embedding.weight.shape == head.weight.shape == (arch.vocabulary, arch.hidden)
    assert (head.weight is embedding.weight) == arch.tied
    final = model.get_submodule(arch.final_norm)
    assert final.weight.shape == (arch.hidden,)
    assert ("LayerNorm" in type(final).__name__) == (arch.norm == "layer")
    layer = model.get_submodule(f"{arch.layer_path}.1")
    found = {name for name, module in layer.named_children() if "norm" in type(module).__name__.lower()}
    named = {name for site in arch.sites for name in (site.norm, site.post_norm) if name}
    if "use_parallel_residual" in CASES[case][1]:
        found.discard("post_attention_layernorm" if layer.post_attention_layernorm is None else "")
    assert found == named
    inner = [name for name, _ in layer.named_modules() if name.endswith(("q_norm", "q_layernorm"))]
    assert bool(inner) == arch.qk_norm


@FAMILIES
def test_positions_and_activation_are_those_of_the_model(case: int) -> None:
    model, arch = build(case)
    names = ("act_fn", "act", "activation_fn", "gelu_impl")
    layer = model.get_submodule(f"{arch.layer_path}.0")
    mlp = getattr(layer, "mlp", layer)
    activation = next(getattr(mlp, name) for name in names if hasattr(mlp, name))
    points = torch.linspace(-4, 4, 101)
    assert close(activation(points), ACT2FN[arch.activation](points), 1e-6)
    if arch.positions != "rotary":
        assert arch.rotary_size == 0
        return
    decoder = model.get_submodule(arch.layer_path.rpartition(".")[0])
    if arch.family == "gptj":  # it has a table of sines and cosines
        needs("transformers", *INTERFACES["gptj"])
        table = decoder.rotary_emb.embed_positions
        assert close(table[1, : arch.rotary_size // 2].asin(), frequencies(arch, 0))
        return
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * arch.layers
    for layer, kind in enumerate(kinds):
        local = kind == "sliding_attention" and hasattr(decoder, "rotary_emb_local")  # Gemma 3 before transformers 5
        rotary = decoder.rotary_emb_local if local else getattr(decoder, "rotary_emb", None)
        rotary = decoder.rotary_embs[kind] if rotary is None else rotary  # OLMo 3 before transformers 5
        found = getattr(rotary, f"{kind}_inv_freq", None)
        found = rotary.inv_freq if found is None else found
        if arch.theta(layer):
            wanted = frequencies(arch, layer)
            assert close(found[: len(wanted)], wanted)
            assert not found[len(wanted) :].any()


def frequencies(arch: Architecture, layer: int) -> Tensor:
    size = arch.in_layer(layer).rotary_size
    return arch.theta(layer) ** -(torch.arange(0, size, 2) / size)


@FAMILIES
@torch.no_grad()
def test_the_architecture_describes_the_computation_of_a_layer(case: int) -> None:
    """Recompute norms, gains, multipliers and residual sums from the outputs of the linear modules."""
    model, arch = build(case)
    backbone = Backbone.open(model)
    backbone.arch = arch
    number = arch.layers - 1
    seen: dict[str, Tensor] = {}
    handles = [_record(model.get_submodule(f"{arch.layer_path}.{number}"), "layer", seen)]
    handles += [_record(model.get_submodule(f"{arch.layer_path}.0"), "first", seen)]
    for site in [site for site in arch.sites if site.is_in(number)]:
        handles += [_record(model.get_submodule(f"{arch.layer_path}.{number}.{site.path}"), site.parts[-1], seen)]
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    seen = {name: value.reshape(1, len(IDS[0]), -1) for name, value in seen.items()}  # OPT joins rows and positions
    if arch.positions != "learned":
        assert close(seen["first in"], backbone.embedding(IDS[0])[None])

    def normed(value: Tensor, part: str) -> Tensor:
        site = arch.site(part)
        path = site.post_norm if part in OUTPUT_PROJECTIONS else site.norm
        if path is None:
            return value
        gain = backbone.gain(number, part)
        gain = gain * backbone.layer_scales.before(number) if part in OUTPUT_PROJECTIONS else gain
        if arch.norm == "rms":
            return F.rms_norm(value, value.shape[-1:], gain, 1e-6)
        return F.layer_norm(value, value.shape[-1:], gain, getattr(layer.get_submodule(path), "bias", None), 1e-5)

    layer = model.get_submodule(f"{arch.layer_path}.{number}")
    after_attention = seen["layer in"] + arch.residual_scale * normed(seen["o out"], "o")
    last = after_attention + arch.residual_scale * normed(seen["down out"], "down")
    query, up = arch.site("q").parts[-1], arch.site("up").parts[-1]
    assert close(seen[f"{query} in"], normed(seen["layer in"], "q"), 1e-4)
    assert close(seen[f"{up} in"], normed(seen["layer in"] if arch.parallel else after_attention, "up"), 1e-4)
    if "ple_down" in arch.parts:
        assert close(seen["ple_gate in"], last, 1e-4)
        last = last + normed(seen["ple_down out"], "ple_down")
    assert close(seen["layer out"], last * backbone.layer_scales.at(number), 1e-4)


def _record(module: nn.Module, name: str, seen: dict[str, Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], out: Any) -> None:
        seen[f"{name} in"] = (args[0] if args else keywords["hidden_states"]).clone()
        seen[f"{name} out"] = (out[0] if isinstance(out, tuple) else out).clone()

    return module.register_forward_hook(hook, with_kwargs=True)


@FAMILIES
@torch.no_grad()
def test_split_returns_the_inputs_of_attention(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arch = build(case)
    if arch.family in ("gptj", "stablelm"):
        needs("transformers", *INTERFACES[arch.family])
    seen: dict[str, Tensor] = {}
    path = f"{arch.layer_path}.1"
    sites = [site for site in arch.sites if set(site.parts) & set("qkv") and site.is_in(1)]
    outputs: dict[str, Tensor] = {}
    handles = [_record(model.get_submodule(f"{path}.{site.path}"), site.path, outputs) for site in sites]
    attention = model.get_submodule(f"{path}.{sites[0].path.rpartition('.')[0]}")
    _spy(model, attention, seen, monkeypatch)
    model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    assert set(seen) == set("qkv")
    parts: dict[str, Tensor] = {}
    arch = arch.in_layer(1)
    for site in sites:
        parts |= split(outputs[f"{site.path} out"][0].T, site, arch)
    if arch.rotary_across:  # the gains of the heads' norms are in the order of the rows
        parts |= {part: join({part: parts[part]}, arch.site(part), arch) for part in "qk"}
    parts |= {part: parts[source[1]] for part in "qkv" if (source := arch.source(1, part))}
    for part in "qkv":
        heads = _normed_heads(parts[part], part, attention, arch)
        if seen[part].shape[1] != heads.shape[0]:
            heads = heads[group_of(arch.heads)]
        rotated = part != "v" and arch.positions == "rotary" and arch.theta(1)
        if part != "v" and arch.rotary_interleaved:
            seen[part] = halves(seen[part], arch.rotary_size)
        if part == "q" and arch.family == "opt":  # it scales the queries, not the scores
            heads = heads * arch.heads.size**-0.5
        span = slice(0, 1) if rotated else slice(None)  # rotation leaves position 0 as it is
        assert close(seen[part][0][:, span], heads[:, span], 1e-6), part


def halves(heads: Tensor, size: int) -> Tensor:
    """Reorder interleaved rotary pairs: the first dimensions of all pairs, then the second ones."""
    pairs = heads[..., :size].unflatten(-1, (-1, 2))
    return torch.cat([pairs[..., 0], pairs[..., 1], heads[..., size:]], dim=-1)


def _normed_heads(rows: Tensor, part: str, attention: nn.Module, arch: Architecture) -> Tensor:
    """Turn a part's output, ``(rows, tokens)``, into heads, ``(heads, tokens, size)``, normalized as in the model."""
    names = [name for name in (f"{part}_norm", f"{part}_layernorm") if hasattr(attention, name)]
    if names and arch.family.startswith("olmo"):  # over all heads at once
        rows = getattr(attention, names[0])(rows.T).T
    heads = rows.reshape(arch.heads.count(part), arch.heads.size, -1).transpose(1, 2)
    return getattr(attention, names[0])(heads[None])[0] if names and not arch.family.startswith("olmo") else heads


def _spy(model: Any, attention: nn.Module, seen: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the queries, keys and values passed to the attention, each ``(batch, heads, tokens, size)``."""
    inner = {"_reshape": (0, 1, 2, 3), "_split_heads": (0, 2, 1, 3)}  # Bloom's and Falcon's do not use the interface
    for name, order in inner.items():
        if hasattr(attention, name):
            original = getattr(attention, name)

            def caught(fused: Tensor, original: Any = original, order: Any = order) -> Any:
                found = original(fused)
                seen.update(zip("qkv", (part.permute(order).clone() for part in found), strict=True))
                return found

            monkeypatch.setattr(attention, name, caught, raising=False)
            return

    def spy(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        if module is attention:
            seen.update(q=q.clone(), k=k.clone(), v=v.clone())
        options.pop("softcap", None)  # Gemma 2's; sdpa refuses it, and it comes after the projections
        return sdpa_attention_forward(module, q, k, v, mask, **options)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    for config in {id(c): c for c in (model.config, attention.config, model.config.get_text_config())}.values():
        monkeypatch.setattr(config, "_attn_implementation", "spy")


@FAMILIES
@torch.no_grad()
def test_a_checkpoint_has_the_weights_of_the_model(case: int, tmp_path: Path) -> None:
    model, arch = build(case)
    model_type, overrides = CASES[case]
    values = {"minicpm": PICO["minicpm"] | overrides}.get(model_type)
    words = pico_tokenizer(["cat", "dog", "mat"])
    folder = Backbone.open(str(save_backbone(tmp_path / "saved", model, words, values)))
    memory = Backbone.open(model)
    memory.arch = arch
    assert folder.arch == arch
    assert Architecture.from_dict(arch.to_dict()) == arch
    for layer in range(arch.layers):
        for part in [part for part in arch.parts if arch.has(layer, part)]:
            weight = folder.part(layer, part)
            assert weight.shape == arch.in_layer(layer).shape(part)
            assert torch.equal(weight, memory.part(layer, part))
            assert torch.equal(folder.gain(layer, part), memory.gain(layer, part))
    assert torch.equal(folder.embedding(), memory.embedding())
    assert torch.equal(folder.unembedding(), model.get_submodule(arch.head).weight)
    assert folder.tokenizer("a cat")["input_ids"] == words("a cat")["input_ids"]
    loaded = folder.load(dtype=torch.float32)
    assert type(loaded) is type(model)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("model_type", ["bloom", "gpt2"])
@torch.no_grad()
def test_a_checkpoint_of_the_model_without_its_head_can_be_read(model_type: str, tmp_path: Path) -> None:
    """As bloom-560m and gpt2 on the Hub: names without their first component."""
    model = pico_model(model_type)
    folder = save_backbone(tmp_path / "bare", model)
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = Backbone.open(str(folder))
    assert torch.equal(backbone.part(2, "v"), Backbone.open(model).part(2, "v"))
    assert torch.equal(backbone.unembedding(), model.lm_head.weight)
    assert torch.equal(backbone.load(dtype=torch.float32)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_gemmas_embedding_multiplier_is_rounded_as_in_transformers() -> None:
    config = pico_config("gemma2", hidden_size=3072, dtype="bfloat16")
    assert architecture(config).embedding_scale == 55.5
    assert architecture(pico_config("gemma2", hidden_size=3072)).embedding_scale == pytest.approx(3072**0.5)


def test_the_error_for_a_missing_config_value_has_its_name() -> None:
    with pytest.raises(ValueError, match=r"falcon: the config lacks a value: .*new_decoder_architecture.*config\.json"):
        architecture(SimpleNamespace(model_type="falcon"))
