"""The model on which transformers' own tests run: copied beside them, where their imports are found."""

from __future__ import annotations

import unittest

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # of transformers

IMAGE, VIDEO, START, END = 3, 4, 5, 6


class Tester:
    """What the tests ask of a model: its sizes, a configuration, and inputs."""

    batch_size, seq_length, is_training = 3, 12, False
    num_hidden_layers, hidden_size, num_attention_heads = 2, 128, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return Qwen3VLConfig(
            text_config={
                "vocab_size": 128,
                "hidden_size": 128,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "max_position_embeddings": 512,
                "pad_token_id": 0,
                "rope_parameters": {
                    "rope_type": "default",
                    "mrope_section": [8, 4, 4],
                    "mrope_interleaved": True,
                    "rope_theta": 10000,
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 128,
                "intermediate_size": 96,
                "num_heads": 4,
                "out_hidden_size": 128,
                "patch_size": 16,
                "spatial_merge_size": 1,
                "temporal_patch_size": 2,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=START,
            vision_end_token_id=END,
            tie_word_embeddings=True,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], 90) + 7
        ids[:, 0], ids[:, 1] = START, IMAGE
        return self.get_config(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == IMAGE).int(),
            "pixel_values": floats_tensor([self.batch_size, 3 * 16 * 16 * 2]),
            "image_grid_thw": torch.tensor([[1, 1, 1]] * self.batch_size),
        }


class Qwen3VLTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (Qwen3VLForConditionalGeneration,)
    test_resize_embeddings = True
    _is_composite = True
    test_generation_tester_mixin_inheritance = None

    def setUp(self):
        self.model_tester = Tester(self)
