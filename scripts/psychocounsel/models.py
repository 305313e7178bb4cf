"""Models as the programs see them: the part of a models.yaml entry that determines answers, and chat messages for it."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """A closed, frozen piece of a model's description."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Sampling(Part):
    """Sampling parameters; null is not sent."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int


class Serve(Part):
    """How a served model is loaded; over how many GPUs is no part of it."""

    dtype: str = "bfloat16"
    max_model_len: int | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None  # Jinja text, where the tokenizer has none


class ModelSpec(Part):
    """A model of models.yaml without titles, prices and other facts that determine no answer."""

    name: str
    id: str
    revision: str | None = None
    unpinned: bool = False  # a name of the Hub without a commit: what it stood for is not known (config: allow_unpinned)
    kind: str = "chat"
    endpoint: str | None = None
    instruction: str | None = None
    system_role: bool = True
    sampling: Sampling | None = None
    structured_output: str = "none"
    chat_template_kwargs: dict = {}
    serve: Serve | None = None
    reward_from: str | None = None
    reward_reads: str = "prompt"


def chat_messages(spec: ModelSpec, user_text: str) -> list[dict]:
    """Return the messages that ask `spec` for an answer: the one place where the system message is decided.

    A model whose template has no system role gets the instruction at the head of the user's turn.
    """
    if spec.instruction is None:
        return [{"role": "user", "content": user_text}]
    if spec.system_role:
        return [{"role": "system", "content": spec.instruction}, {"role": "user", "content": user_text}]
    return [{"role": "user", "content": f"{spec.instruction}\n\n{user_text}"}]
