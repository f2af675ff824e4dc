"""The promise in ten lines: a seed gives the same tokens with speculation on, off and shaped.

Needs a running cluster (`specinfer up`) and nothing but `pip install specinfer`.
"""

from specinfer import Client, SpeculationOptions

SHAPES = {
    "off": SpeculationOptions(enabled=False),
    "the cluster's": SpeculationOptions(),
    "chain of 4": SpeculationOptions(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1)),
    "widths 3,2": SpeculationOptions(max_nodes=9, max_depth=2, widths=(3, 2)),
}


def main() -> None:
    with Client("127.0.0.1:50051", timeout=60) as client:
        runs = {
            name: client.generate(
                messages=[{"role": "user", "content": "Explain itertools.groupby."}],
                max_tokens=64,
                temperature=0.8,
                top_p=0.95,
                seed=7,
                speculation=shape,
            )
            for name, shape in SHAPES.items()
        }
    for name, run in runs.items():
        rounds = run.speculation.num_rounds
        print(f"{name:14} {len(run.token_ids)} tokens in {rounds} rounds")
    assert len({run.token_ids for run in runs.values()}) == 1


if __name__ == "__main__":
    main()
