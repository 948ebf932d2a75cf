"""The linear model is one of transformers: built by name, saved, loaded, and trained to the exact solution."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from recipes.models.build import from_pretrained, from_scratch
from recipes.models.configuration import scratch_config
from recipes.models.linear import LinearConfig, LinearModel


def build(**keys) -> LinearModel:
    return from_scratch(
        AutoModelForSequenceClassification,
        scratch_config("linear_regression", keys),
        seed=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention=None,
    )


def test_it_starts_from_zero_whether_built_here_or_by_transformers():
    by_name = AutoModelForSequenceClassification.from_config(LinearConfig(num_features=3, num_outputs=2))
    for model in (build(num_features=3, num_outputs=2), by_name, LinearModel(LinearConfig())):
        assert isinstance(model, LinearModel) and model.base_model is model
        assert all(parameter.count_nonzero() == 0 for parameter in model.parameters())
    assert by_name(torch.randn(4, 3)).logits.shape == (4, 2)
    assert by_name.linear.weight.shape == (2, 3)


def test_wrong_attributes_are_refused():
    from conf.errors import RequestError

    with pytest.raises(RequestError, match=r"model\.config\.num_features"):
        scratch_config("linear_regression", {"num_feature": 3})


def test_the_loss_is_the_mean_square():
    model = LinearModel(LinearConfig(num_features=2))
    assert model(torch.ones(3, 2)).loss is None
    for labels in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1], [2], [3]])):
        assert model(torch.ones(3, 2), labels=labels).loss.item() == pytest.approx(14 / 3)


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_save_and_load(tmp_path, attention):
    model = build(num_features=3, num_outputs=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).num_outputs == 2
    features = torch.randn(5, 3)
    ours = from_pretrained(
        AutoModelForSequenceClassification,
        tmp_path,
        dtype=torch.float32,
        device=torch.device("cpu"),
        attention=attention,
    )
    for loaded in (ours, AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        assert isinstance(loaded, LinearModel)
        assert torch.equal(loaded(features).logits, model(features).logits)


def test_it_learns_the_line():
    x = torch.linspace(-1, 1, 50)[:, None]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        model(x, labels=2 * x).loss.backward()
        optimizer.step()
    assert model.linear.weight.item() == pytest.approx(2, abs=1e-4) and abs(model.linear.bias.item()) < 1e-4
