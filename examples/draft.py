"""Let a smaller model draft the answer within one budget (speculative decoding); count the passes.

python examples/draft.py
python examples/draft.py --model MODEL --draft SMALLER --ram-budget 6GB --image page.png
"""

import argparse
from pathlib import Path

import qwen3_vl_memory_optimizations as q

ASSETS = Path(q.__file__).parent / "assets"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ASSETS / "tiny-qwen3vl", help="directory or hub id")
    parser.add_argument("--draft", default=ASSETS / "tiny-qwen3vl", help="directory or hub id, same vocabulary")
    parser.add_argument("--ram-budget", default="2GB", help="memory of the whole process, both models included")
    parser.add_argument("--image", type=Path, default=ASSETS / "demo" / "digits_0.png")
    parser.add_argument("--prompt", default="read the digits.")
    arguments = parser.parse_args()
    settings = {"ram_budget": arguments.ram_budget}
    with q.create_optimized_model(arguments.model, settings, assistant=arguments.draft) as model:
        processor = q.load_processor(arguments.model)
        inputs, _ = q.prepare_within_budget(processor, model, arguments.prompt, [arguments.image])
        passes: list[int] = []
        model.register_forward_hook(lambda *_: passes.append(1))
        for title, options in (("with the draft", {}), ("without", {"assistant_model": None})):
            passes.clear()
            output = model.generate(**inputs, max_new_tokens=64, **options)
            answer = output[0, inputs["input_ids"].shape[1] :]
            print(f"{title}: {processor.decode(answer)} ({len(answer)} tokens in {len(passes)} passes of the model)")


if __name__ == "__main__":
    main()
