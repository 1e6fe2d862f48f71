"""Questions in random words, and a model and tokenizer to answer them, of given shapes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from dsg.evaluation import Question

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM

Kind = Literal["letter", "cloze"]

NUM_OPTIONS = 4
PROMPT_WORDS = (60, 200)
OPTION_WORDS = (1, 8)
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
_FIXED = ("Answer:", "A", "B", "C", "D")
FEWEST_TOKENS = len(_SPECIAL) + len(_FIXED) + 1


@dataclass(frozen=True)
class Workload:
    """What both sides have to do.

    Attributes:
        kind: `letter`: four letters of one token each. `cloze`: four options of several tokens that
            follow the same prompt.
        num_questions: How many.
        d_model: Width of the model's residual stream, a multiple of 4.
        num_layers: Its decoder layers.
        vocab_size: Its tokens, each of which is a word.
        seed: Of weights and words.
    """

    kind: Kind
    num_questions: int
    d_model: int
    num_layers: int
    vocab_size: int
    seed: int


def random_model(workload: Workload) -> "Gemma2ForCausalLM":
    """A random Gemma 2 in evaluation mode, float32, with gemma-2-2b's proportions of a layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    width = workload.d_model
    config = Gemma2Config(
        vocab_size=workload.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=workload.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        query_pre_attn_scalar=width // 4,
        max_position_embeddings=PROMPT_WORDS[1] + 56,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        return Gemma2ForCausalLM(config).eval()


def word_tokenizer(vocab_size: int) -> Any:
    """One token per word, and a bos token in front.

    Args:
        vocab_size: At least `FEWEST_TOKENS`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    fixed = (*_SPECIAL, *_FIXED)
    words = [*fixed, *(f"w{index}" for index in range(vocab_size - len(fixed)))]
    places = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<bos> $A", special_tokens=[("<bos>", places["<bos>"])]
    )
    roles = ("pad_token", "eos_token", "bos_token", "unk_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(roles, _SPECIAL, strict=True))
    )


def random_questions(workload: Workload) -> list[Question]:
    """Questions of 60 to 200 words, whose answers are letters or have 1 to 8 words each."""
    generator = torch.Generator().manual_seed(workload.seed)
    num_words = workload.vocab_size - len(_SPECIAL) - len(_FIXED)

    def words(limits: tuple[int, int]) -> str:
        count = int(torch.randint(limits[0], limits[1] + 1, (1,), generator=generator))
        ids = torch.randint(num_words, (count,), generator=generator).tolist()
        return " ".join(f"w{index}" for index in ids)

    questions = []
    for index in range(workload.num_questions):
        prompt = f"{words(PROMPT_WORDS)}\nAnswer:"
        letters = tuple(f" {letter}" for letter in "ABCD")
        texts = tuple(f" {words(OPTION_WORDS)}" for _ in range(NUM_OPTIONS))
        questions.append(
            Question(
                id=index,
                domain=workload.kind,
                form=None,
                prompt=prompt,
                options=letters if workload.kind == "letter" else texts,
                answer=index % NUM_OPTIONS,
                protocol="lm_eval" if workload.kind == "letter" else "cloze",
            )
        )
    return questions
