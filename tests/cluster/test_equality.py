"""Through the whole cluster: the tokens with speculation on are the tokens with it off."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specinfer import AsyncClient, Completion
from specinfer.options import GenerateOptions
from specinfer_cli.cluster import ClusterSettings, RunningCluster, running_cluster
from specinfer_cli.lossless_cases import all_cases
from specinfer_cli.lossless_check import Checker

PROMPTS = ("def add(a, b):", "What is this?", "0123456789" * 8)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def cluster(
    request: pytest.FixtureRequest, tiny_settings: ClusterSettings
) -> Iterator[RunningCluster]:
    settings = dataclasses.replace(tiny_settings, dtype=request.param)
    with running_cluster(settings) as running:
        yield running


async def test_every_setting_and_shape_gives_the_same_tokens(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        checker = Checker(client, chat=True, concurrency=8)
        tally = await checker.run(all_cases(list(PROMPTS), 2, 24), lambda _: None)
    assert tally.errors == []
    assert tally.divergences == []
    assert tally.lossless
    assert tally.num_accepted_tokens > tally.num_cases


async def test_the_check_sees_a_planted_difference(cluster: RunningCluster) -> None:
    """The check's own negative control: another seed is other tokens, and it says so."""
    async with AsyncClient(cluster.router) as client:
        checker = Checker(client, chat=True, concurrency=1)
        case = next(case for case in all_cases(["hello"], 1, 24) if case.setting == "temperature 1")
        plain = await client.generate("hello", **case.options())
        other_seed: GenerateOptions = {**case.options(), "seed": case.seed + 1}
        other = await client.generate("hello", **other_seed)
        await checker._compare(case, "the cluster's", plain, other)
    assert checker.tally.num_divergences == 1
    assert not checker.tally.lossless


async def test_sixteen_streams_at_once_give_what_each_gives_alone(cluster: RunningCluster) -> None:
    requests: list[GenerateOptions] = [
        {
            "token_ids": [5 + (index * 7 + place) % 200 for place in range(3 + 11 * index)],
            "max_tokens": 8 + 5 * (index % 7),
            "temperature": 0.0 if index % 3 == 0 else 0.9,
            "top_p": 1.0 if index % 2 else 0.9,
            "seed": index,
            "ignore_eos": True,
        }
        for index in range(16)
    ]
    async with AsyncClient(cluster.router) as client:
        alone = [await client.generate(**options) for options in requests]
        together = await asyncio.gather(*(client.generate(**options) for options in requests))
    assert [run.token_ids for run in together] == [run.token_ids for run in alone]
    assert [run.text for run in together] == [run.text for run in alone]
    assert [len(run.token_ids) for run in alone] == [run.get("max_tokens") for run in requests]


async def test_stop_strings_cut_at_the_same_byte(cluster: RunningCluster) -> None:
    options: GenerateOptions = {"max_tokens": 48, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    async with AsyncClient(cluster.router) as client:
        whole = await client.generate(PROMPTS[0], **options)
        stop = whole.text[len(whole.text) // 2 :][:3]
        assert stop
        stopping: GenerateOptions = {**options, "stop": stop}
        plain: GenerateOptions = {**stopping, "speculation": False}
        runs = [await client.generate(PROMPTS[0], **each) for each in (stopping, plain)]
    for run in runs:
        assert run.text == whole.text[: whole.text.index(stop)]
        assert (run.finish_reason, run.stop_match) == ("stop", stop)
    assert runs[0].token_ids == runs[1].token_ids


async def test_logprobs_are_the_targets_whatever_was_guessed(cluster: RunningCluster) -> None:
    async with AsyncClient(cluster.router) as client:
        runs: list[Completion] = [
            await client.generate(
                PROMPTS[1], max_tokens=16, temperature=0.0, logprobs=3, speculation=on
            )
            for on in (True, False)
        ]
    assert runs[0].logprobs == runs[1].logprobs
    assert [entry.token_id for entry in runs[0].logprobs] == list(runs[0].token_ids)
    assert all(entry.logprob == entry.top[0][1] for entry in runs[0].logprobs)


async def test_greedy_output_is_that_of_transformers_in_float64(
    tiny_settings: ClusterSettings, tiny_pair: tuple[Path, Path]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_pair[0], dtype=torch.float64)
    prompts = [[1, 10 + index, 40, 7 * index + 5, 99] for index in range(6)]
    with running_cluster(dataclasses.replace(tiny_settings, dtype="float64")) as running:
        async with AsyncClient(running.router) as client:
            ours = [
                await client.generate(
                    token_ids=prompt, max_tokens=32, temperature=0.0, ignore_eos=True
                )
                for prompt in prompts
            ]
    for prompt, run in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert list(run.token_ids) == theirs[0, len(prompt) :].tolist()
    assert sum(run.speculation.num_accepted_tokens for run in ours) > 0
