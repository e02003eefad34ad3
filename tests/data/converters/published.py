"""A row of each format, laid out as its data card or README says; texts are made up."""

from __future__ import annotations

import copy
from typing import Any


def _dialogue(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer}]


def _rmb_answer(text: str, score: float | None = None) -> dict[str, Any]:
    return {"llm_name": f"model-{text}", "answer": text} | ({} if score is None else {"score": score})


_RMB_PROMPT = [{"content": "2 + 2?", "language": "English", "role": "user"}]

_ROWS: dict[str, dict[str, Any]] = {
    "ranked": {
        "prompt": "2 + 2?",
        "responses": [{"content": text, "score": score} for text, score in (("4", 3), ("four", 2), ("5", 1))],
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: 2 + 2?\n\nAssistant: 4",
        "rejected": "\n\nHuman: 2 + 2?\n\nAssistant: 5",
    },
    "chat-pairs": {"chosen": _dialogue("4"), "rejected": _dialogue("5"), "source": "magpie_ultra"},
    "ultrafeedback": {
        "source": "flan_v2",
        "instruction": "2 + 2?",
        "models": ["a", "b", "c"],
        "completions": [
            {
                "model": model,
                "response": text,
                "overall_score": overall,
                "fine-grained_score": fine,
                "annotations": {"helpfulness": {"Rating": "5", "Rationale": "Right."}},
                "critique": "Good.",
                "custom_system_prompt": "Be brief.",
                "principle": "helpfulness",
            }
            for model, text, overall, fine in (
                ("a", "5", 1.0, 4.0),
                ("b", "4", 9.0, 4.5),
                ("c", "four", 8.0, 5.0),
            )
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    },
    "ultrafeedback-binarized": {
        "prompt": "2 + 2?",
        "prompt_id": "p1",
        "chosen": _dialogue("4"),
        "rejected": _dialogue("5"),
        "messages": _dialogue("4"),
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    },
    "helpsteer2": {
        "split": "train",
        "prompt": "2 + 2?",
        "response_1": "4",
        "response_2": "5",
        "preference_strength": -3,
        "preference_statement": "Response 1 is much better than Response 2",
        "preference_elaboration": "It is right.",
        "three_most_similar_preferences": [],
        "all_preferences_unprocessed": [],
    },
    "helpsteer2-ratings": {
        "prompt": "2 + 2?",
        "response": "4",
        "helpfulness": 4,
        "correctness": 4,
        "coherence": 4,
        "complexity": 0,
        "verbosity": 0,
    },
    "helpsteer3": {
        "domain": "stem",
        "language": "english",
        "context": [{"role": "user", "content": "2 + 2?"}],
        "response1": "5",
        "response2": "4",
        "overall_preference": 2,
        "individual_preference": [{"score": 2, "reasoning": "It is right."}],
    },
    "nectar": {
        "prompt": "\n\nHuman: 2 + 2?\n\nAssistant: ",
        "answers": [
            {"answer": text, "model": model, "rank": rank}
            for text, model, rank in (("5", "a", 3.0), ("4", "b", 1.0), ("four", "c", 2.0))
        ],
        "turns": 1,
        "num_responses": 3,
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    },
    "pku-saferlhf": {
        "prompt": "2 + 2?",
        "response_0": "5",
        "response_1": "4",
        "prompt_source": "Alpaca3-70B",
        "response_0_source": "Alpaca3-8B",
        "response_1_source": "WizardLM-30B-Uncensored",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "response_0_harm_category": {"Privacy Violation": False},
        "response_1_harm_category": {"Privacy Violation": True},
        "response_0_severity_level": 0,
        "response_1_severity_level": 2,
        "better_response_id": 1,
        "safer_response_id": 0,
        "response_0_sha256": "ef2d",
        "response_1_sha256": "4b22",
    },
    "arena": {
        "question_id": "58210e39b3fd4441a2bd4a518bb44c2d",
        "model_a": "chatglm-6b",
        "model_b": "koala-13b",
        "winner": "model_b",
        "judge": "arena_user_973",
        "conversation_a": _dialogue("5"),
        "conversation_b": _dialogue("4"),
        "turn": 1,
        "anony": True,
        "language": "English",
        "tstamp": 1682351591.1322,
        "openai_moderation": {"flagged": False},
        "toxic_chat_tag": {"roberta-large": {"flagged": False, "probability": 0.01}},
    },
    "rewardbench": {
        "prompt": "2 + 2?",
        "chosen": "4",
        "chosen_model": "human",
        "rejected": "5",
        "rejected_model": "gpt4",
        "subset": "math-prm",
        "id": 3,
    },
    "rewardbench-2": {
        "id": "7",
        "prompt": "2 + 2?",
        "chosen": ["4"],
        "rejected": ["3", "5", "22"],
        "num_correct": 1,
        "num_incorrect": 3,
        "total_completions": 4,
        "models": ["a", "b", "c", "d"],
        "subset": "Math",
        "additional_metadata": {"category": "arithmetic", "valid": 1.0},
    },
    "rm-bench": {
        "id": "math-1",
        "prompt": "2 + 2?",
        "chosen": ["4", "It is 4, as 1 + 1 + 1 + 1.", "**4**, as 1 + 1 + 1 + 1."],
        "rejected": ["5", "It is 5, as 1 + 1 + 1 + 1.", "**5**, as 1 + 1 + 1 + 1."],
        "domain": "math",
    },
    "rmb": {
        "pair_uid": "14587",
        "conversation_input": _RMB_PROMPT,
        "chosen": _rmb_answer("4", 4.5),
        "reject": _rmb_answer("5", 2.5),
        "category_path": "Pairwise_set/Helpfulness/Reasoning/Human Decision Making",
    },
    "rmb-bon": {
        "conversation_input": _RMB_PROMPT,
        "bon_best": _rmb_answer("4"),
        "loser_list": [_rmb_answer("5"), _rmb_answer("22")],
        "bon_uid": "1291",
        "category_path": "BoN_set/Harmlessness/S1",
    },
    "judgebench": {
        "pair_id": "81ec57f2",
        "original_id": "10646",
        "source": "mmlu-pro-computer science",
        "question": "2 + 2?",
        "response_model": "gpt-4o-2024-05-13",
        "response_A": "5",
        "response_B": "4",
        "label": "B>A",
    },
}
_ROWS["rmb-polar"] = _ROWS["rmb"]
_ROWS |= {
    "tulu": {
        "id": "ai2-adapt-dev/x_1",
        "prompt": "2 + 2?",
        "chosen": _dialogue("4"),
        "rejected": _dialogue("5"),
        "source": "ai2-adapt-dev/x",
    },
    "llama-factory-alpaca": {
        "instruction": "2 + 2?",
        "input": "",
        "chosen": "4",
        "rejected": "5",
    },
    "llama-factory-sharegpt": {
        "conversations": [{"from": "human", "value": "2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
    "llama-factory-v1": {
        f"{side}_messages": [
            {"role": turn["role"], "content": [{"type": "text", "value": turn["content"]}]}
            for turn in _dialogue(answer)
        ]
        for side, answer in (("chosen", "4"), ("rejected", "5"))
    },
    "ms-swift": {"messages": _dialogue("4"), "rejected_response": "5"},
    "openai": {
        "input": {"messages": _dialogue("4")[:1], "tools": [], "parallel_tool_calls": True},
        "preferred_output": _dialogue("4")[1:],
        "non_preferred_output": _dialogue("5")[1:],
    },
    "openrlhf": {"chosen": _dialogue("4"), "rejected": _dialogue("5"), "margin": 1.0},
    "trl": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "label-studio": {
        "id": 11,
        "annotations": [
            {
                "id": 21,
                "completed_by": 3,
                "result": [
                    {
                        "id": "Dx_aB91ISN",
                        "type": "pairwise",
                        "value": {"selected": "right"},
                        "origin": "manual",
                        "to_name": "comparison",
                        "from_name": "comparison",
                    }
                ],
                "was_cancelled": False,
                "ground_truth": False,
                "created_at": "2026-11-24T10:00:00.000000Z",
                "updated_at": "2026-11-24T10:00:04.000000Z",
                "lead_time": 4.288,
                "result_count": 1,
                "task": 11,
            }
        ],
        "file_upload": "tasks.json",
        "drafts": [],
        "predictions": [],
        "data": {"prompt": "2 + 2?", "answer1": "5", "answer2": "4"},
        "meta": {},
        "created_at": "2026-11-24T09:00:00.000000Z",
        "updated_at": "2026-11-24T10:00:04.000000Z",
        "inner_id": 1,
        "total_annotations": 1,
        "cancelled_annotations": 0,
        "total_predictions": 0,
        "project": 83,
        "updated_by": 3,
        "comment_authors": [],
    },
    "argilla": {
        "id": "q-1",
        "fields": {"instruction": "2 + 2?", "response1": "5", "response2": "4"},
        "metadata": {},
        "suggestions": {},
        "responses": {"ranking": [{"value": ["response2", "response1"], "user_id": "7d1e"}]},
        "vectors": {},
        "_server_id": "c0ffee",
    },
    "trl-unpaired": {"prompt": "2 + 2?", "completion": "4", "label": True},
}

FORMATS = sorted(_ROWS)


def published(name: str, **changes: Any) -> dict[str, Any]:
    """A row of the format, with changes."""
    return copy.deepcopy(_ROWS[name]) | changes


def rmb_pairs(
    pairs: list[tuple[str, str]], scores: dict[str, float], prompt: str = "2 + 2?"
) -> list[dict[str, Any]]:
    """Pairwise rows of RMB for one prompt: (chosen, reject) by text, with the score of each text."""
    return [
        published(
            "rmb",
            pair_uid=f"{prompt}-{number}",
            conversation_input=[{"role": "user", "content": prompt, "language": "English"}],
            chosen=_rmb_answer(chosen, scores[chosen]),
            reject=_rmb_answer(rejected, scores[rejected]),
        )
        for number, (chosen, rejected) in enumerate(pairs)
    ]
