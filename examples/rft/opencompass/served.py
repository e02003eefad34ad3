"""The policy behind an OpenAI-compatible server, for rules.py and judged.py; read from environment variables.

POLICY_URL (``http://host:8000/v1``) and POLICY_NAME (its name there) are required. POLICY_TOKENIZER (folder
or hub id; POLICY_NAME by default) counts tokens. THINKING=1 is for a policy that writes ``<think>…</think>``
first: the answer is what follows. MAX_OUT_LEN (4096; 16384 with THINKING) bounds both, in tokens.
"""

import os

from opencompass.models import OpenAISDK

for _variable in ("POLICY_URL", "POLICY_NAME"):
    if not os.environ.get(_variable):
        raise SystemExit(f"set {_variable}; examples/rft/opencompass/served.py says what it is")
del _variable

thinking = os.environ.get("THINKING", "0") == "1"
max_out_len = int(os.environ.get("MAX_OUT_LEN", "16384" if thinking else "4096"))

chat = dict(
    round=[dict(role="HUMAN", api_role="HUMAN"), dict(role="BOT", api_role="BOT", generate=True)],
    reserved_roles=[dict(role="SYSTEM", api_role="SYSTEM")],
)
policy = dict(
    type=OpenAISDK,
    abbr="policy",
    path=os.environ["POLICY_NAME"],
    openai_api_base=os.environ["POLICY_URL"],
    key="EMPTY",  # OpenCompass writes this file with all its values to the work folder: keep keys out of it
    tokenizer_path=os.environ.get("POLICY_TOKENIZER", os.environ["POLICY_NAME"]),
    meta_template=chat,
    max_out_len=max_out_len,
    max_seq_len=max_out_len + 16384,
    query_per_second=32,
    batch_size=64,
    retry=5,
)

del os  # OpenCompass writes every name that is left here to a file
