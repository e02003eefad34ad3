"""All formats by name."""

from __future__ import annotations

from polar_ft.data.converters.annotation import argilla, label_studio
from polar_ft.data.converters.arena import arena
from polar_ft.data.converters.benchmarks import (
    domain_of,
    judgebench,
    rewardbench,
    rewardbench_2,
    rm_bench,
)
from polar_ft.data.converters.dialogues import chat_pairs, hh_rlhf
from polar_ft.data.converters.format import Format
from polar_ft.data.converters.frameworks import (
    alpaca_pair,
    factory_pair,
    openai_pair,
    preference,
    sharegpt_pair,
    swift_pair,
    unpaired,
    unpaired_prompt,
)
from polar_ft.data.converters.helpsteer import helpsteer2, helpsteer2_ratings, helpsteer3, same_question
from polar_ft.data.converters.nectar import nectar
from polar_ft.data.converters.ranked import ranked
from polar_ft.data.converters.rmb import rmb, rmb_bon, rmb_polar, same_prompt
from polar_ft.data.converters.saferlhf import pku_saferlhf
from polar_ft.data.converters.ultrafeedback import ultrafeedback

# Special formats before general ones: of two that fit rows equally well, `recognise` takes the first.
CONVERTERS: dict[str, Format] = {
    "ranked": Format(ranked, "ranked rows of polar-ft, as pair rows; pair rows as they are"),
    "hh-rlhf": Format(
        hh_rlhf, "Anthropic's hh-rlhf: two dialogues as strings", "Anthropic/hh-rlhf", layout="chat-pairs"
    ),
    "chat-pairs": Format(
        chat_pairs, "two dialogues as lists of messages", "Skywork/Skywork-Reward-Preference-80K-v0.2"
    ),
    "ultrafeedback": Format(ultrafeedback, "UltraFeedback, scored answers", "openbmb/UltraFeedback"),
    "ultrafeedback-binarized": Format(
        chat_pairs,
        "UltraFeedback, pairs",
        "HuggingFaceH4/ultrafeedback_binarized",
        "train_prefs",
        layout="chat-pairs",
    ),
    "helpsteer2": Format(helpsteer2, "HelpSteer2, preference/preference.jsonl.gz"),
    "helpsteer2-ratings": Format(
        helpsteer2_ratings, "HelpSteer2, rated answers", "nvidia/HelpSteer2", gather=same_question
    ),
    "helpsteer3": Format(helpsteer3, "HelpSteer3, preferences", "nvidia/HelpSteer3:preference"),
    "nectar": Format(nectar, "Nectar, seven ranked answers", "berkeley-nest/Nectar"),
    "pku-saferlhf": Format(pku_saferlhf, "PKU-SafeRLHF, pairs", "PKU-Alignment/PKU-SafeRLHF"),
    "arena": Format(arena, "Chatbot Arena, votes", "lmsys/chatbot_arena_conversations"),
    "tulu": Format(
        chat_pairs,
        "Tülu 3's preference mixtures",
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
        layout="chat-pairs",
    ),
    "rewardbench": Format(rewardbench, "RewardBench", "allenai/reward-bench", "filtered"),
    "rewardbench-2": Format(rewardbench_2, "RewardBench 2", "allenai/reward-bench-2", "test", "all"),
    "rm-bench": Format(
        rm_bench, "RM-Bench, three styles a side", "THU-KEG/RM-Bench", pairing="all", of_file=domain_of
    ),
    "rmb": Format(rmb, "RMB, the folder Pairwise_set, its pairs", gather=same_prompt),
    "rmb-polar": Format(
        rmb_polar,
        "RMB, the folder Pairwise_set, the POLAR paper's protocol",
        gather=same_prompt,
        layout="rmb",
    ),
    "rmb-bon": Format(rmb_bon, "RMB, the folder BoN_set", pairing="all"),
    "judgebench": Format(judgebench, "JudgeBench", "ScalerLab/JudgeBench", "gpt"),
    "llama-factory-alpaca": Format(alpaca_pair, "LLaMA-Factory's ranking data, alpaca"),
    "llama-factory-sharegpt": Format(sharegpt_pair, "LLaMA-Factory's ranking data, sharegpt"),
    "llama-factory-v1": Format(factory_pair, "LLaMA-Factory's v1 layout, chosen_messages"),
    "ms-swift": Format(swift_pair, "ms-swift, messages with rejected_response or rejected_messages"),
    "openai": Format(openai_pair, "OpenAI's preference fine-tuning"),
    "trl": Format(preference, "TRL's preferences, also with an implicit prompt", layout="chat-pairs"),
    "openrlhf": Format(preference, "OpenRLHF, in all forms that it reads", layout="chat-pairs"),
    "label-studio": Format(label_studio, "Label Studio's export JSON, comparisons with its tag Pairwise"),
    "argilla": Format(argilla, "records of Argilla 2 with a ranking, as JSON or from the hub"),
    "trl-unpaired": Format(
        unpaired, "TRL's unpaired preferences, as ranked rows", pairing="all", gather=unpaired_prompt
    ),
}
