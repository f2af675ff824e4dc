"""The promise: a seed gives the same tokens with speculation on, off and shaped."""

import argparse

from specinfer import Client, SpeculationOptions

SHAPES = {
    "off": SpeculationOptions(enabled=False),
    "the cluster's": SpeculationOptions(),
    "chain of 4": SpeculationOptions(max_nodes=4, max_depth=4, widths=(1, 1, 1, 1)),
    "widths 3,2": SpeculationOptions(max_nodes=9, max_depth=2, widths=(3, 2)),
}
QUESTION = "Explain itertools.groupby."


def main(router: str) -> None:
    with Client(router, timeout=60) as client:
        runs = {
            name: client.chat(
                QUESTION, max_tokens=64, temperature=0.8, top_p=0.95, seed=7, speculation=shape
            ).completion
            for name, shape in SHAPES.items()
        }
    for name, run in runs.items():
        print(f"{name:14} {len(run.token_ids)} tokens in {run.speculation.num_rounds} rounds")
    assert len({run.token_ids for run in runs.values()}) == 1
    print("all the same tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", default="127.0.0.1:50051")
    main(parser.parse_args().router)
