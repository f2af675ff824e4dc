"""Batches, the clock-bound trainer, distillation, acceptance and the exported folder."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from specinfer_training.acceptance import measure_acceptance, summarise_ranks
from specinfer_training.batches import Batch, collate, iter_batches
from specinfer_training.distill import agreement_loss, join_chats, label_chats, loss_from_labels
from specinfer_training.generate import generate_rows
from specinfer_training.questions import write_questions
from specinfer_training.shapes import served_copy
from specinfer_training.threads import SpareThreads
from specinfer_training.tokenizer import Chat
from specinfer_training.train import TrainOptions, answer_logits, label_loss, rate_factor, train

VOCAB = 48
END = 1


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        tie_word_embeddings=True,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    model.eval()
    return model


def make_chats(count: int = 12) -> list[Chat]:
    rng = random.Random(1)
    chats: list[Chat] = []
    for number in range(count):
        answer = [rng.randrange(2, VOCAB) for _ in range(2 + number % 5)]
        ids = (0, 2 + number, *answer, END)
        chats.append(Chat(ids, (False, False, *(True for _ in answer), True)))
    return chats


def test_collated_labels_are_the_answers() -> None:
    chats = make_chats(3)
    batch = collate(chats, (2, 0), pad_id=0)
    expected = [*chats[2].ids[2:], *chats[0].ids[2:]]
    assert batch.labels.tolist() == expected
    flat = batch.input_ids.flatten()
    assert flat[batch.positions[0]] == chats[2].ids[1]
    assert flat[batch.positions[-1]] == chats[0].ids[-2]


def test_a_pass_holds_every_chat_once_within_the_token_limit() -> None:
    chats = make_chats(50)
    batches = list(iter_batches(chats, 24, 0, random.Random(0)))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(50))
    assert all(batch.input_ids.numel() <= 24 for batch in batches)


def test_padding_does_not_change_logits() -> None:
    model, chats = tiny_llama(), make_chats(6)
    with torch.inference_mode():
        together = answer_logits(model, collate(chats, range(6), 0))
        alone = torch.cat([answer_logits(model, collate(chats, (row,), 0)) for row in range(6)])
    torch.testing.assert_close(together, alone)


def test_rate_follows_the_clock() -> None:
    assert rate_factor(0, 0.0) < rate_factor(29, 0.0) == 1.0
    assert rate_factor(500, 0.5) == 0.5
    assert rate_factor(500, 1.5) == 0.0


def test_training_learns_and_resumes(tmp_path: Path) -> None:
    model, chats = tiny_llama(), make_chats()
    batch = collate(chats, range(12), 0)
    with torch.inference_mode():
        before = float(label_loss(answer_logits(model, batch), batch))
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    def batches() -> Iterator[Batch]:
        while True:
            yield batch

    state = tmp_path / "state.pt"
    train(model, batches(), TrainOptions(seconds=1.0), state_path=state, before_step=count)
    with torch.inference_mode():
        after = float(label_loss(answer_logits(model, batch), batch))
    assert steps > 1
    assert after < before
    again = tiny_llama(seed=5)
    train(again, batches(), TrainOptions(seconds=1.0), state_path=state)
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_agreement_is_zero_only_for_equal_distributions() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, VOCAB)
    kept = logits.log_softmax(-1).topk(5)
    same = agreement_loss(logits, kept.indices, kept.values)
    other = agreement_loss(torch.randn(7, VOCAB), kept.indices, kept.values)
    assert abs(float(same)) < 1e-5
    assert float(other) > 0.1


def test_labels_stay_with_their_chats() -> None:
    model, chats = tiny_llama(), make_chats()
    labels = label_chats(model, chats, 0, 20)
    batch = collate(chats, (7, 3, 11), 0)
    with torch.inference_mode():
        loss = loss_from_labels(labels)(answer_logits(model, batch), batch)
    assert abs(float(loss)) < 2e-3


def test_joined_chats_keep_all_answers() -> None:
    chats = make_chats(30)
    joined = join_chats(chats, random.Random(0))
    assert sum(map(sum, (chat.is_answer for chat in joined))) == sum(
        map(sum, (chat.is_answer for chat in chats))
    )
    assert all(chat.ids.count(0) == 1 for chat in joined)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_equals_a_loop_without_cache(temperature: float) -> None:
    model = tiny_llama()
    prompts = [(0, 5, 9), (0, 7, 3), (0, 2, 2)]
    noise = [torch.randn(12, VOCAB) for _ in prompts]
    rows = generate_rows(
        model, prompts, max_new=12, eos_id=END, temperature=temperature, noise=noise
    )
    for prompt, drawn, row in zip(prompts, noise, rows, strict=True):
        ids = list(prompt)
        for step in range(12):
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0, -1]
            scores = logits / temperature + drawn[step] if temperature else logits
            ids.append(int(scores.argmax()))
            if ids[-1] == END:
                break
        assert row == tuple(ids[3:])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_drafter_equal_to_its_target_is_always_accepted(temperature: float) -> None:
    model = tiny_llama()
    prompts = [(0, 5, 9), (0, 7), (0, 2, 2)]
    measured = measure_acceptance(
        model, model, prompts, eos_id=END, temperature=temperature, max_new=20
    )
    assert measured.top_k_hits[1] == 1.0


def test_rounds_follow_the_chain() -> None:
    ranks = torch.tensor([0, 0, 3, 0, 1, 0, 0, 0, 0, 0, 0])
    measured = summarise_ranks([ranks])
    # Chain of 5: accepts 2 (then a miss), 1 (a miss), 5 (its end), and nothing is left to accept.
    assert measured.tokens_per_round[5] == pytest.approx(11 / 3)
    assert measured.by_depth == pytest.approx((1.0, 2 / 3, 1 / 3, 1 / 3, 1 / 3))
    assert measured.top_k_hits[2] == pytest.approx(10 / 11)


def test_the_served_copy_is_bfloat16_and_separate() -> None:
    model = tiny_llama()
    copy = served_copy(model)
    assert copy.dtype is torch.bfloat16
    assert model.dtype is torch.float32
    assert copy.lm_head.weight is copy.model.embed_tokens.weight


def test_threads_follow_the_load(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 0 0 0 0 0 0 0 0\n")
    threads = SpareThreads(num_cores=2, stat=stat)
    stat.write_text("cpu 110 90 0 100 0 0 0 0 0 0\n")
    assert threads.count() == 2
    stat.write_text("cpu 210 150 0 140 0 0 0 0 0 0\n")
    assert threads.count() == 1
    stat.unlink()
    assert threads.count() == 2


def test_questions_are_json_lines(tmp_path: Path) -> None:
    write_questions(tmp_path / "prompts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines) >= 40
    assert all(line["prompt"] for line in lines)


def test_exported_folder_loads(tmp_path: Path) -> None:
    from specinfer_training.export import export_model
    from specinfer_training.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words to learn"], 300)
    for _ in range(2):
        export_model(tiny_llama(), tokenizer, tmp_path / "target")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype="auto")
    assert loaded.dtype is torch.bfloat16
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
