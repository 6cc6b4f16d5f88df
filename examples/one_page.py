"""Answer a question about one image within a memory budget.

python examples/one_page.py
python examples/one_page.py --model MODEL --ram-budget 2GB --image page.png --prompt "What is due?"
"""

import argparse
from pathlib import Path

import qwen3_vl_memory_optimizations as q

ASSETS = Path(q.__file__).parent / "assets"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ASSETS / "tiny-qwen3vl", help="directory or hub id")
    parser.add_argument("--ram-budget", default="2GB", help="memory of the whole process")
    parser.add_argument("--image", type=Path, default=ASSETS / "demo" / "digits_0.png")
    parser.add_argument("--prompt", default="read the digits.")
    arguments = parser.parse_args()
    with q.create_optimized_model(arguments.model, {"ram_budget": arguments.ram_budget}) as model:
        processor = q.load_processor(arguments.model)
        inputs, notes = q.prepare_within_budget(processor, model, arguments.prompt, [arguments.image])
        output = model.generate(**inputs, max_new_tokens=64)
    print(*notes, processor.decode(output[0, inputs["input_ids"].shape[1] :]), sep="\n" if notes else "")


if __name__ == "__main__":
    main()
