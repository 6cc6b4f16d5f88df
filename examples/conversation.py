"""Ask several questions about one image in a conversation; each turn reuses the tokens before it.

python examples/conversation.py
python examples/conversation.py --model MODEL --image page.png --prompts "What is it?" "Who wrote it?"
"""

import argparse
from pathlib import Path

import qwen3_vl_memory_optimizations as q

ASSETS = Path(q.__file__).parent / "assets"
TURN = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ASSETS / "tiny-qwen3vl", help="directory or hub id")
    parser.add_argument("--ram-budget", default="2GB", help="memory of the whole process")
    parser.add_argument("--image", type=Path, default=ASSETS / "demo" / "vqa_1.png")
    parser.add_argument("--prompts", nargs="+", default=["what shape is in the image?", "what color is the shape?"])
    arguments = parser.parse_args()
    with q.create_optimized_model(arguments.model, {"ram_budget": arguments.ram_budget}) as model:
        processor, output = q.load_processor(arguments.model), None
        inputs, _ = q.prepare_within_budget(processor, model, arguments.prompts[0], [arguments.image])
        for prompt in arguments.prompts:
            if output is not None:  # go on behind the answer; the image stays where it is
                turn = processor.tokenizer(TURN.format(prompt), add_special_tokens=False).input_ids
                ids = output.new_tensor([[*output[0].tolist(), *turn]])
                kinds = (ids == processor.tokens.image_id).int()
                inputs |= {"input_ids": ids, "attention_mask": output.new_ones(ids.shape), "mm_token_type_ids": kinds}
            output = model.generate(**inputs, max_new_tokens=64)
            kv = model.memory_optimizer.get_memory_efficiency_stats()["kv"]
            print(f"{prompt} {processor.decode(output[0, inputs['input_ids'].shape[1] :])}")
            print(f"  {kv['reused_tokens']} of {kv['prompt_tokens']} prompt tokens reused so far")


if __name__ == "__main__":
    main()
