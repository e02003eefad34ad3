"""The README of an exported reward model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_ft.model.backbones import backbone_of
from polar_ft.template import PolarTemplate

_CARD = """\
---
library_name: {library}
pipeline_tag: text-classification
tags: [reward-model, polar]
---
# {name}

A reward model in the manner of POLAR (arXiv 2507.05197), {made} from `{base}` with polar_ft. It scores a
candidate against a reference: the higher the reward, the more the candidate is like what the reference shows
to be wanted. Rewards compare candidates of the same prompt and reference; their zero has no meaning.

## Score with polar_ft

```python
from polar_ft import RewardScorer

scorer = RewardScorer.from_pretrained("{name}")
question = {{"prompt": "What is the capital of China?", "reference": "Beijing."}}
rewards = scorer.score([{{**question, "output": "Beijing."}}, {{**question, "output": "Shanghai."}}])
print(rewards)
```

On the command line: `polar-ft eval {name} held_out.jsonl` for the accuracy on held-out pairs.

## Serve

`polar-ft serve {name}` gives the same rewards over HTTP. A client needs this folder for its tokenizer:

```python
from polar_ft import RewardModelClient

client = RewardModelClient("{name}", server_address="127.0.0.1:30000")
question = {{"prompt": "What is the capital of China?", "reference": "Beijing."}}
rewards = client([{{**question, "output": "Beijing."}}, {{**question, "output": "Shanghai."}}])
print(rewards)
```

## The input

One text is scored at a time. This is what the model was trained on, and what any engine must be given, as
token ids, the last one included:

    BOS prompt ⏎ reference {separator} prompt ⏎ candidate {reward_token}

`{separator}` is id {separator_id}, `{reward_token}` is id {reward_token_id}. The reward is the score of the
last token. References and candidates are cut on the right at {max_response_length} tokens, the prompt on the
left so that all fits into {max_length}. `polar_ft.template.PolarTemplate.from_pretrained("{name}")` makes
these ids.
"""

_WITH_TRANSFORMERS = """
## Score with transformers

```python
import torch
from polar_ft.groups import TextGroup
from polar_ft.template import PolarTemplate
from transformers import {auto_class}

template = PolarTemplate.from_pretrained("{name}")
model = {auto_class}.from_pretrained("{name}"{trust}).eval()
group = TextGroup("What is the capital of China?", ("Beijing.",), ("Beijing.", "Shanghai."))
[encoded] = template.encode([group])
with torch.no_grad():
    for candidate in encoded.sequences:
        inputs = torch.tensor([candidate.tolist()])
        print(model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits.item())
```
"""


_ADAPTERS = """
## What this folder holds

LoRA adapters in peft's format (`adapter_config.json`, `adapter_model.safetensors`) and the reward head
(`reward_head.safetensors`), not the weights of `{base}`: those are read from where `base_model_name_or_path`
in `adapter_config.json` says. The adapters have Llama's names: InternLM2's `wqkv` is three projections there.
Engines other than polar_ft want the merged model: convert the checkpoint without `--adapter-only`.
"""


def model_card(
    name: str, base: str, template: PolarTemplate, config: Mapping[str, Any], *, repackaged: bool = False
) -> str:
    """Text of the README.

    Args:
        name: Of the folder.
        base: Of the model that was fine-tuned, as the config names it.
        template: What the model was trained with.
        config: The exported ``config.json``.
        repackaged: The base is the reward model itself, in another form.
    """
    own_code = bool(backbone_of(config).code)
    made = "converted" if repackaged else "fine-tuned"
    return _common(name, base, template, "transformers", made) + _WITH_TRANSFORMERS.format(
        name=name,
        auto_class="AutoModel" if own_code else "AutoModelForSequenceClassification",
        trust=", trust_remote_code=True" if own_code else "",
    )


def adapter_card(name: str, base: str, template: PolarTemplate) -> str:
    """Text of the README of adapters; arguments as of `model_card`."""
    return _common(name, base, template, "peft", "fine-tuned") + _ADAPTERS.format(
        base=base.rstrip("/").split("/")[-1]
    )


def _common(name: str, base: str, template: PolarTemplate, library: str, made: str) -> str:
    return _CARD.format(
        made=made,
        name=name,
        base=base.rstrip("/").split("/")[-1],
        library=library,
        separator_id=template.separator_id,
        reward_token_id=template.reward_token_id,
        **template.settings,
    )
