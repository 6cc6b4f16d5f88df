"""The `conftest.py` of transformers' own tests: each model they construct is optimised, as the environment says."""

from __future__ import annotations

import functools
import json
import os
import tempfile

import transformers

from qwen3_vl_memory_optimizations import create_optimized_model

_class = transformers.Qwen3VLForConditionalGeneration
_plain = _class.__init__


@functools.wraps(_plain)
def _init(self, *args, **kwargs):
    _plain(self, *args, **kwargs)
    weights = list(self.parameters())
    if type(self) is not _class or any(weight.is_meta for weight in weights):
        return  # under construction by `from_pretrained`
    settings = {"cache_dir": tempfile.mkdtemp(), **json.loads(os.environ["SETTINGS"])}
    share = settings.pop("share", None)
    if share is not None:
        settings["tensor_budget"] = int(share * sum(weight.nbytes for weight in weights))
    training = self.training
    create_optimized_model(self, settings, dtype=self.dtype)
    self.train(training)


if os.environ.get("SETTINGS"):
    _class.__init__ = _init
