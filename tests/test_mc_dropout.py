"""mc_dropout: all of torch's own dropout acts, all else is in eval mode, and equal passes are an error."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ups_fast
from ups_fast import mc_dropout
from ups_fast.selection import mc_dropout as where_it_was

EQUAL = "all passes of model are equal bit for bit although dropout is on"


class Calls(nn.Module):
    """A module called in a way of its own."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


def layer(kind=nn.TransformerEncoderLayer, p=0.3, **options):
    return kind(16, 4, 32, batch_first=True, dropout=p, **options)


def padded(module, x):
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, -1] = True
    return module(x, src_key_padding_mask=mask)


def attention(module, x):
    return module(x, x, x, need_weights=False)[0]


def first(module, x):
    return module(x)[0]


def twice(module, x):
    return module(x, x)


def recurrent(kind, **options):
    return kind(16, 8, batch_first=True, dropout=0.3, **{"num_layers": 2, **options})


DROPS = {
    "encoder layer": layer,
    "encoder layer, norm first": lambda: layer(norm_first=True),
    "encoder": lambda: nn.TransformerEncoder(layer(), 2),
    "encoder, padded": lambda: Calls(nn.TransformerEncoder(layer(), 2), padded),
    "decoder": lambda: Calls(nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 1), twice),
    "transformer": lambda: Calls(nn.Transformer(16, 4, 1, 1, 32, batch_first=True, dropout=0.3), twice),
    "attention": lambda: Calls(nn.MultiheadAttention(16, 4, dropout=0.3, batch_first=True), attention),
    "LSTM": lambda: Calls(recurrent(nn.LSTM), first),
    "GRU": lambda: recurrent(nn.GRU),
    "RNN": lambda: Calls(recurrent(nn.RNN, bidirectional=True), first),
    "alpha": lambda: nn.AlphaDropout(0.3),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.3),
    "channels": lambda: nn.Dropout1d(0.3),
    "parallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.3))),
    "compiled": lambda: torch.compile(
        nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.3)), backend="eager", fullgraph=True
    ),
    "traced by fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.3))),
}


@pytest.fixture(params=[torch.no_grad, torch.inference_mode, torch.enable_grad])
def grad_mode(request):
    with request.param():
        yield


def head(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", DROPS)
def test_all_of_torchs_own_dropout_acts(name, grad_mode):
    torch.manual_seed(0)
    model, x = DROPS[name]().eval(), torch.randn(6, 5, 16)
    modes = [module.training for module in model.modules()]
    with mc_dropout(model):
        logits = torch.stack([head(model(x)) for _ in range(4)])
    assert (logits.detach().std(dim=0) > 0).double().mean() > 0.3
    assert [module.training for module in model.modules()] == modes
    with mc_dropout(model, active=False):
        assert torch.equal(head(model(x)), head(model(x)))


def test_dropout_beside_other_modules_acts_in_each_of_them():
    """One Dropout that acts must not hide others that do not."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 16)
    parts = {
        "layer": layer(),
        "lstm": recurrent(nn.LSTM),
        "attention": nn.MultiheadAttention(16, 4, dropout=0.3),
    }
    model = nn.ModuleDict({**parts, "drop": nn.Dropout(0.3), "norm": nn.BatchNorm1d(5)}).eval()
    with torch.no_grad(), mc_dropout(model):
        for name, part in parts.items():
            a, b = (head(part(x, x, x) if name == "attention" else part(x)) for _ in range(2))
            assert not torch.equal(a, b), name
        assert not model["norm"].training
        assert torch.equal(model["norm"](x), model["norm"](x))
    assert model["norm"].num_batches_tracked == 0


class Functional(nn.Module):
    """Its dropout is a call, beside a module that is there but never reached."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(16, 4), nn.Dropout(0.5)

    def forward(self, x):
        return {"logits": F.dropout(self.linear(x), 0.5, self.training)}


@pytest.mark.parametrize("passes", [2, 10])
def test_equal_passes_are_an_error(passes, grad_mode):
    for model in (Functional(), Functional().train()):
        modes = [module.training for module in model.modules()]
        with pytest.raises(RuntimeError, match=EQUAL), mc_dropout(model):
            images = torch.randn(3, 16)
            torch.stack([model(images)["logits"] for _ in range(passes)])
        assert [module.training for module in model.modules()] == modes and not model._forward_hooks


def test_equal_passes_of_other_ways_to_call_are_an_error(grad_mode):
    model = Functional()
    for call in (
        lambda: model(torch.randn(3, 16).repeat(10, 1)),  # all passes as one batch
        lambda: [model(batch) for _ in range(3) for batch in (torch.randn(3, 16), torch.randn(3, 16))],
        lambda: model(x=torch.randn(3, 16)),
    ):
        with pytest.raises(RuntimeError, match=EQUAL), mc_dropout(model):
            call()


def test_healthy_loops_make_no_other_pass_and_keep_their_random_numbers():
    model, x = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5)), torch.randn(3, 16)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)
    with mc_dropout(model):
        got = [model(x) for _ in range(4)]
    assert len(calls) == 4
    torch.manual_seed(3)
    model.train()
    assert all(torch.equal(a, model(x)) for a in got)
    state = torch.get_rng_state()
    with mc_dropout(model):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    with mc_dropout(model):
        model(x)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    model(x)
    assert torch.equal(torch.get_rng_state(), after)  # the pass made at the end draws from elsewhere


def test_passes_that_are_equal_by_chance_are_none():
    """Few elements and a small p: most pairs of passes drop nothing."""
    torch.manual_seed(0)
    model, x = nn.Dropout(0.2), torch.ones(1, 2)
    for _ in range(30):
        with mc_dropout(model):
            model(x), model(x)


def test_a_small_p_in_a_small_layer_is_no_error():
    """Nine of ten passes drop nothing of these."""
    torch.manual_seed(0)
    for _ in range(30):
        model = nn.Sequential(nn.Linear(16, 10), nn.Dropout(0.01), nn.Linear(10, 3))
        with mc_dropout(model):
            model(torch.ones(1, 16)), model(torch.ones(1, 16))
        assert model[1].p == 0.01


@dataclass
class Output:
    features: torch.Tensor
    logits: torch.Tensor


class Several(nn.Module):
    """Returns what lies before its dropout, and after that what lies behind it."""

    def __init__(self, wrap):
        super().__init__()
        self.body, self.drop, self.head = nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 4)
        self.wrap = wrap

    def forward(self, x):
        features = self.body(x)
        return self.wrap(features, self.head(self.drop(features)))


WRAPS = {
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: [{"a": a}, (None, [b])],
    "dict": lambda a, b: {"features": a, "logits": b},
    "dataclass": Output,
    "labels": lambda a, b: b.argmax(dim=-1),
    "nothing": lambda a, b: None,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_one_of_several_results_that_varies_is_enough(wrap, grad_mode):
    model, x = Several(wrap), torch.randn(3, 16)
    with mc_dropout(model):
        model(x), model(x), model(x)


def test_equal_passes_in_a_dataclass_are_an_error():
    model, x = Calls(Functional(), lambda module, x: Output(x, module(x)["logits"])), torch.randn(3, 16)
    with pytest.raises(RuntimeError, match=EQUAL), mc_dropout(model):
        model(x), model(x)


def test_a_block_within_that_turns_dropout_off_is_no_error():
    model, x = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5)), torch.randn(3, 16)
    with mc_dropout(model):
        with mc_dropout(model, active=False):
            assert torch.equal(model(x), model(x))
        assert not torch.equal(model(x), model(x))
    for inner in (model, nn.Sequential(model)):
        with mc_dropout(model), mc_dropout(inner, active=False):
            assert torch.equal(model(x), model(x))
    equal = Functional()  # but the innermost block still looks
    with pytest.raises(RuntimeError, match=EQUAL), mc_dropout(equal, active=False), mc_dropout(equal):
        equal(x), equal(x)
    with pytest.raises(RuntimeError, match=EQUAL), mc_dropout(model):
        model.eval()  # as many an evaluation does first
        model(x), model(x)


class Merging(nn.Linear):
    """Adds something to its weights in eval mode and takes it away in training mode, as low-rank adapters do."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += -1 if mode else 1
        return super().train(mode)


def test_modules_change_their_mode_by_their_own_train():
    model = nn.Sequential(Merging(16, 64), nn.Dropout(0.5), nn.BatchNorm1d(64).eval())
    before = model[0].weight.detach().clone()
    with mc_dropout(model):
        assert (model[0].weight > before).all()
        model(torch.randn(3, 16))
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=0, atol=1e-6)
    assert [module.training for module in model.modules()] == [True, True, True, False]


class Fixed(nn.Module):
    """Has no eval mode, as exported programs have none."""

    def train(self, mode=True):
        raise NotImplementedError


def test_a_mode_that_is_refused_leaves_the_others():
    model = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5), Fixed(), nn.Dropout(0.5))
    with pytest.raises(NotImplementedError), mc_dropout(model):
        pass
    assert all(module.training for module in model.modules()) and not model._forward_hooks


def test_an_abandoned_generator_gives_the_modes_back():
    model, x = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.5)), torch.randn(3, 16)

    def passes():
        with mc_dropout(model):
            while True:
                yield model(x)

    drawn = passes()
    next(drawn)
    assert not model.training
    drawn.close()
    assert all(module.training for module in model.modules()) and not model._forward_hooks


def test_copies_made_within_a_block_are_compared_with_nothing():
    model, x = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5)), torch.randn(3, 16)
    with mc_dropout(model):
        model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            twin.eval()
            assert torch.equal(twin(x), twin(x))


def test_the_pass_at_the_end_is_made_once():
    """A loop with a block for each pass must not cost twice as much."""
    model, x, calls = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5)), torch.randn(3, 16), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        with mc_dropout(model):
            model(x)
    assert len(calls) == 5
    model[1].p = 0.3  # another network
    with mc_dropout(model):
        model(x)
    assert len(calls) == 7


def test_inputs_that_change_in_place_are_other_inputs():
    model, x = Functional(), torch.randn(3, 16)
    with pytest.raises(KeyError), mc_dropout(model):
        model(x)
        x += 1
        model(x)
        raise KeyError  # the user's own error is not hidden by a comparison
    assert not model._forward_hooks


def test_nothing_is_compared_in_a_trace():
    model, x = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.3)), torch.randn(3, 16)
    with mc_dropout(model):
        torch.func.vmap(model, randomness="different")(x[None])
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(x)
            model(fake), model(fake)
        model(x[:0]), model(x[:0])


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Dropout(0.0),
        recurrent(nn.LSTM, num_layers=1),
        layer(p=0.0),
        nn.MultiheadAttention(16, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_nothing_that_drops_is_an_error(model):
    with pytest.raises(ValueError, match="model must have a dropout module with p > 0"), mc_dropout(model):
        pass
    with mc_dropout(model, active=False):
        assert not any(module.training for module in model.modules())
    assert model.training


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused():
    plain = nn.Sequential(nn.Linear(16, 4), nn.Dropout(0.3)).eval()
    said = "must not hold TorchScript modules with dropout, got a scripted Dropout"
    for scripted in (torch.jit.script(plain), torch.jit.trace(plain, torch.randn(3, 16))):
        for model in (scripted, nn.Sequential(scripted, nn.Dropout(0.5))):
            with pytest.raises(TypeError, match=said), mc_dropout(model):
                pass


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"), mc_dropout(head):
        pass


def test_one_name():
    assert mc_dropout is ups_fast.mc_dropout is where_it_was
