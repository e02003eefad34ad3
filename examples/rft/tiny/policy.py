"""A tiny policy: supervised on a careless clerk's answers, then trained by TRL with POLAR as its reward.

Runs in an environment with TRL (tools/rft_env.sh trl); `run.py` calls it:

    python examples/rft/tiny/policy.py supervise DATA OUT [--seed 0]
    python examples/rft/tiny/policy.py train DATA POLICY OUT --model RM --server HOST:PORT [--shuffled]
    python examples/rft/tiny/policy.py floor DATA OUT --model RM --server HOST:PORT

The policy reads the catalogue entry and the question and writes the answer:

    Finished in navy. Domus bowl: what colour?    →    You get it in blue.

The reward model reads the question as the prompt and the entry as the reference, as it was trained.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.domain_rm.make_data import TOPICS
from polar_ft.rft.reward import PolarReward
from polar_ft.rft.trl import PolarRewardFunction

NEW_TOKENS = 12


@dataclass(frozen=True)
class Question:
    """A question about a product.

    Attributes:
        text: What the customer asks.
        entry: The catalogue entry, the reference.
        topic: Key of `TOPICS`.
        fact: The right fact, in a customer's words.
    """

    text: str
    entry: str
    topic: str
    fact: str

    @property
    def prompt(self) -> str:
        """What the policy reads."""
        return f"{self.entry} {self.text}\n"

    def wordings(self, fact: str) -> set[str]:
        """All answers that state a fact."""
        return {answer.format(fact=fact) for answer in TOPICS[self.topic].answers}


def read_questions(file: Path) -> list[Question]:
    """Reads the questions of a file of examples/domain_rm."""
    facts = {word: fact for topic in TOPICS.values() for fact, words in topic.facts.items() for word in words}
    questions = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        entry = row["reference"][0]["content"]
        (fact,) = (facts[word] for word in entry.strip(".").split() if word in facts)
        questions.append(Question(row["prompt"][0]["content"], entry, row["subset"], fact))
    return questions


def shuffled_entries(questions: list[Question], rng: random.Random) -> list[str]:
    """For each question the entry of another one of its topic: rewards are as large, and say nothing."""
    entries = [question.entry for question in questions]
    for topic in TOPICS:
        places = [place for place, question in enumerate(questions) if question.topic == topic]
        for place, other in zip(places, rng.sample(places, len(places)), strict=True):
            entries[place] = questions[other].entry
    return entries


def careless_answer(question: Question, rng: random.Random) -> str:
    """A careless clerk's answer: right in 30 %, the next fact of the list in 50 %, any fact in 20 %."""
    facts = list(TOPICS[question.topic].facts)
    following = facts[(facts.index(question.fact) + 1) % len(facts)]
    fact = rng.choices([question.fact, following, rng.choice(facts)], weights=[30, 50, 20])[0]
    return rng.choice(TOPICS[question.topic].answers).format(fact=fact)


def supervise(data: Path, out: Path, seed: int, steps: int = 300, batch: int = 128) -> None:
    """Makes a policy and trains it on the clerk's answers; the loss is on answers only.

    The learning rate falls to 0 in the second half, so that the policy knows the clerk's habits: its
    likeliest answer is the next fact, which is wrong.
    """
    questions = read_questions(data / "train.jsonl")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [text for question in questions for text in (question.prompt, *question.wordings(question.fact))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=768, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for step in range(steps):
        chosen = [rng.choice(questions) for _ in range(batch)]
        prompts = [tokenizer.encode(question.prompt) for question in chosen]
        answers = [[*tokenizer.encode(careless_answer(q, rng)), tokenizer.eos_token_id] for q in chosen]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((batch, width), tokenizer.pad_token_id)
        labels = torch.full((batch, width), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        # Padding is on the right, where causal attention does not see it.
        loss = policy(input_ids=ids, labels=labels).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20, (steps - step) / (steps / 2))
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)


@torch.no_grad()
def measure(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, held_out: list[Question]) -> dict:
    """Shares of held-out answers that are right and well-formed; greedy, and sampled at temperature 1."""
    result: dict[str, float] = {}
    inputs = tokenizer([question.prompt for question in held_out], return_tensors="pt", padding=True)
    for name, sample in (("greedy", False), ("sampled", True)):
        output = policy.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=sample,
            top_k=0,
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [a.strip() in q.wordings(q.fact) for a, q in zip(answers, held_out, strict=True)]
        formed = [
            any(a.strip() in q.wordings(fact) for fact in TOPICS[q.topic].facts)
            for a, q in zip(answers, held_out, strict=True)
        ]
        result |= {f"right_{name}": sum(right) / len(right), f"formed_{name}": sum(formed) / len(formed)}
    return result


class Measure(TrainerCallback):
    """Measures the policy before the first step and after every so many."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, held_out: list[Question], every: int) -> None:
        self.tokenizer, self.held_out, self.every = tokenizer, held_out, every
        self.started = time.perf_counter()
        self.measured: list[dict] = []

    def on_train_begin(self, args, state, control, model=None, **_):
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.every == 0:
            self._measure(model, state.global_step)

    def _measure(self, model: LlamaForCausalLM, step: int) -> None:
        generator = torch.random.get_rng_state()
        figures = {"step": step, "seconds": round(time.perf_counter() - self.started, 1)}
        self.measured.append(figures | measure(model, self.tokenizer, self.held_out))
        torch.random.set_rng_state(generator)
        print(self.measured[-1], flush=True)


def train(args: argparse.Namespace) -> None:
    """GRPO with POLAR's rewards; with ``--shuffled`` each question has the reference of another one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.policy)
    questions = read_questions(args.data / "train.jsonl")
    references = [question.entry for question in questions]
    if args.shuffled:
        references = shuffled_entries(questions, random.Random(args.seed))
    rows = [
        {"prompt": q.prompt, "question": q.text, "reference": reference}
        for q, reference in zip(questions, references, strict=True)
    ]
    held_out = read_questions(args.data / "held_out.jsonl")[:256]
    callback = Measure(tokenizer, held_out, every=max(1, args.steps // 4))
    trainer = GRPOTrainer(
        str(args.policy),
        reward_funcs=PolarRewardFunction(
            args.model, server_address=args.server, prompt="question", watch=args.out / "watch"
        ),
        args=GRPOConfig(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=256,
            num_generations=16,
            max_completion_length=NEW_TOKENS,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            beta=args.beta,
            temperature=1.0,
            top_k=0,
            logging_steps=1,
            seed=args.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    result = {"measured": callback.measured, "rewards": rewards}
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def compare_floor(args: argparse.Namespace) -> None:
    """Writes the range of the rewards of right, wrong and empty answers, next to the measured floor."""
    reward = PolarReward(args.model, args.server)
    held_out = read_questions(args.data / "held_out.jsonl")[:256]
    answers = {
        "right": [(q, answer) for q in held_out for answer in q.wordings(q.fact)],
        "wrong": [
            (q, answer)
            for q in held_out
            for fact in TOPICS[q.topic].facts
            if fact != q.fact
            for answer in q.wordings(fact)
        ],
        # With nothing after the thoughts PolarReward gives the floor: the model itself is asked.
        "empty": [(q, "") for q in held_out],
    }
    result: dict[str, object] = {"floor": reward.floor}
    for kind, some in answers.items():
        rows = [{"prompt": q.text, "reference": q.entry, "output": answer} for q, answer in some]
        rewards = sorted(reward.client(rows))
        result[kind] = {
            "answers": len(rewards),
            "lowest": rewards[0],
            "median": statistics.median(rewards),
            "highest": rewards[-1],
        }
    reward.close()
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("supervise")
    job.add_argument("data", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--seed", type=int, default=0)
    job = jobs.add_parser("train")
    job.add_argument("data", type=Path)
    job.add_argument("policy", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--model", required=True)
    job.add_argument("--server", required=True)
    job.add_argument("--steps", type=int, default=40)
    job.add_argument("--beta", type=float, default=0.1)
    job.add_argument("--lr", type=float, default=2e-4)
    job.add_argument("--shuffled", action="store_true")
    job.add_argument("--seed", type=int, default=0)
    job = jobs.add_parser("floor")
    job.add_argument("data", type=Path)
    job.add_argument("out", type=Path)
    job.add_argument("--model", required=True)
    job.add_argument("--server", required=True)
    args = parser.parse_args()
    if args.job == "supervise":
        supervise(args.data, args.out, args.seed)
    elif args.job == "floor":
        compare_floor(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
