"""Ask the same question about every image of a folder; the model is loaded once.

python examples/folder.py
python examples/folder.py --model MODEL --ram-budget 2GB --folder scans --prompt "Who is the sender?"
"""

import argparse
from pathlib import Path

import qwen3_vl_memory_optimizations as q

ASSETS = Path(q.__file__).parent / "assets"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=ASSETS / "tiny-qwen3vl", help="directory or hub id")
    parser.add_argument("--ram-budget", default="2GB", help="memory of the whole process")
    parser.add_argument("--folder", type=Path, default=ASSETS / "demo")
    parser.add_argument("--pattern", default="vqa_*.png", help="which files")
    parser.add_argument("--prompt", default="what shape is in the image?")
    arguments = parser.parse_args()
    with q.create_optimized_model(arguments.model, {"ram_budget": arguments.ram_budget}) as model:
        processor = q.load_processor(arguments.model)
        for image in sorted(arguments.folder.glob(arguments.pattern)):
            try:
                inputs, _ = q.prepare_within_budget(processor, model, arguments.prompt, [image])
            except q.InputError as error:  # a damaged file does not end the run
                print(f"{image.name}: {error}")
                continue
            output = model.generate(**inputs, max_new_tokens=64)
            print(f"{image.name}: {processor.decode(output[0, inputs['input_ids'].shape[1] :])}")


if __name__ == "__main__":
    main()
