"""Print what an answer cost: the memory of each account, reads from the SSD, and the metrics of the package.

python examples/metrics.py
python examples/metrics.py --model MODEL --ram-budget 2GB --image page.png
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
        inputs, _ = q.prepare_within_budget(processor, model, arguments.prompt, [arguments.image])
        model.generate(**inputs, max_new_tokens=64)
        stats = model.memory_optimizer.get_memory_efficiency_stats()
        print(f"budget {stats['budget']['ram_budget_bytes'] / 1e6:.0f} MB")
        print(f"peak of the process {stats['budget']['process_peak_rss_bytes'] / 1e6:.0f} MB")
        for account, n_bytes in stats["budget"]["accounts_bytes"].items():
            print(f"  {account} {n_bytes / 1e6:.1f} MB")
        print(f"read from the SSD {stats['paging']['bytes_read'] / 1e6:.1f} MB")
        print(f"hit rate {stats['paging']['hit_rate']:.2f}")
        for name, value in q.get_memory_performance_metrics(model).items():
            print(f"{name} {'not measured' if value is None else f'{value:.3g}'}")


if __name__ == "__main__":
    main()
