"""Losses that look inside the models, on models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguforge.distill.batches import Batch, make_batch, untaught
from gguforge.distill.objective import Objective, run
from gguforge.distill.recipe import Losses
from gguforge.quant.errors import InputError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from gguforge.distill.students import fresh_model  # noqa: E402

SHARED = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_key_value_heads": 1, **SHARED},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 60},
    "bert": {"architectures": ["BertModel"], "num_hidden_layers": 2, **SHARED},
}
ONE = Losses(attention_relation=1.0, relation_heads=2)


def model(name: str, seed: int, **changes: Any) -> Any:
    return fresh_model({**CONFIGS[name], **changes}, Path("config.json"), seed).eval()


def batch() -> Batch:
    ids = np.arange(1, 20, dtype=np.int32)
    return make_batch([untaught(ids[:n], np.arange(n) > 0) for n in (9, 6)])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_layers_queries_keys_and_values_are_heard(name: str) -> None:
    found = run(model(name, 0), batch(), attention=True).attention
    assert found is not None
    assert [tuple(one.shape[:2]) for one in found] == [(2, 9)] * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_relations_draw_the_last_layer_and_all_before_it(name: str) -> None:
    student, teacher, given = model(name, 0), model(name, 1), batch()
    objective = Objective(ONE, causal=name != "bert")
    outputs = [run(one, given, attention=True) for one in (student, teacher)]
    loss = objective.total(objective(given, outputs[0], outputs[1]))
    loss.backward()
    assert float(loss.detach()) > 0
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in student.parameters())
    same = objective(given, outputs[1], outputs[1])["attention_relation"]
    assert float(same.detach()) == pytest.approx(0, abs=1e-6)


def test_an_encoder_learns_relations_from_a_wider_one() -> None:
    student, teacher = model("bert", 0), model("bert", 1, hidden_size=32)
    objective = Objective(Losses(relation=1.0, attention_relation=1.0, relation_heads=2), causal=False)
    optimizer, given, found = torch.optim.Adam(student.parameters(), lr=1e-2), batch(), []
    for _ in range(30):
        with torch.no_grad():
            wanted = run(teacher, given, True, True)
        loss = objective.total(objective(given, run(student, given, True, True), wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.5 * found[0]


def test_padding_is_related_to_nothing() -> None:
    given = batch()
    objective = Objective(ONE, causal=False)
    student, teacher = (run(model("bert", seed), given, attention=True) for seed in (0, 1))
    assert student.attention is not None
    before = float(objective(given, student, teacher)["attention_relation"].detach())
    changed = [one.detach().clone() for one in student.attention]
    for one in changed:
        one[1, 6:] = 7.0
    after = objective(given, type(student)(None, None, tuple(changed)), teacher)["attention_relation"]
    assert float(after.detach()) == pytest.approx(before)


def test_what_does_not_fit_is_refused() -> None:
    given = batch()
    outputs = run(model("llama", 0), given, True, True), run(model("llama", 1), given, True, True)
    with pytest.raises(InputError, match=r"relation_heads.*divisor of the width"):
        Objective(Losses(attention_relation=1.0, relation_heads=3))(given, *outputs)
    with pytest.raises(InputError, match="were not found"):
        run(torch.nn.Linear(1, 1), given, attention=True)
    encoder = run(model("bert", 0), given)
    with pytest.raises(InputError, match="language model's head"):
        Objective(Losses(cross_entropy=1.0))(given, encoder, None)
    with pytest.raises(InputError, match="hold no entries"):
        Objective(Losses(sampled_kl=1.0))(given, outputs[0], None)


def test_vocabularies_are_compared_as_far_as_both_go() -> None:
    given, student = batch(), model("llama", 0)
    padded = model("llama", 0, vocab_size=64)
    padded.load_state_dict(
        {
            name: torch.cat([weight, weight.new_zeros(4, 16)]) if len(weight) == 60 else weight
            for name, weight in student.state_dict().items()
        }
    )
    loss = Objective(Losses(forward_kl=1.0))(given, run(student, given), run(padded, given))["forward_kl"]
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
