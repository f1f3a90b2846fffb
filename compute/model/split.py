"""Cut any Hugging Face causal language model into stages, without knowing its family.

Theory of operation. A stage runs the model's **own** `forward`, on a copy of the model in which everything
the stage does not serve is a weightless gate: foreign decoder layers, and, where the stage does not begin or
end the model, the modules before or after the layers. Three things make the copy a stage:

- a gate before the first own layer hands that layer the received hidden state, whatever came along (`Entry`);
- a gate behind the last own layer stops the forward and hands out the hidden state it was given (`Exit`);
- the model is shown every layer at its original index, so masks, layer types, rotary tables and cache slots
  are chosen by its own code exactly as in the unsplit model. The output is then the same, bit by bit.

What has to be known of the model for this comes from its survey (`mycel.compute.model.survey`).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from mycel.compute.engine import Span
from mycel.compute.model.gates import EdgeGate, Gate, replace_module
from mycel.compute.model.survey import Anatomy


def gated_edges(anatomy: Anatomy, span: Span) -> list[str]:
    """Edge modules that a stage of `span` does without."""
    foreign: list[str] = list(anatomy.idle)
    keep: set[str] = set()
    if span.start == 0:
        keep.update(anatomy.before)
    else:
        foreign.extend(anatomy.before)
    if span.end == anatomy.n_layers:
        keep.update(anatomy.after)
    else:
        foreign.extend(anatomy.after)
    for target, source in anatomy.tied:
        target_kept = any(target.startswith(path + ".") for path in keep)
        if target_kept:
            keep.update(path for path in foreign if source.startswith(path + "."))
    return [path for path in foreign if path not in keep]


def stage_class(anatomy: Anatomy, model_class: type[PreTrainedModel], span: Span) -> type[PreTrainedModel]:
    """A subclass of the model's own class that is built with gates wherever `span` has no business.

    Its instances ask the checkpoint for exactly the weights the stage needs. Keeps the class's name, by which
    transformers looks up how checkpoints of the family are converted.
    """

    def build(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        layers = self.get_submodule(anatomy.layers_path)
        for index in range(anatomy.n_layers):
            if not span.start <= index < span.end:
                layers[index] = Gate(layers[index], anatomy.tuple_size)
        for path in gated_edges(anatomy, span):
            replace_module(self, path, EdgeGate(self.get_submodule(path)))
        held = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        tied = self.all_tied_weights_keys or {}
        self.all_tied_weights_keys = {
            target: source for target, source in tied.items() if target in held and source in held
        }

    body = {"__init__": build, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)
