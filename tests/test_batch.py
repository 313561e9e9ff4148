"""Rows to tokens and labels: training reads exactly what generation will."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layouts import encode, encode_all
from softprompt.data.batch import collate, epoch_order
from softprompt.data.chat import Unlabelled
from softprompt.data.encoded import Encoded, EncodedRows
from softprompt.data.example import Example, Message
from softprompt.data.layout import TooLong, to_answer, to_judge
from softprompt.data.source import load_splits
from softprompt.data.template import Template
from softprompt.data.tokenizer import special_tokens_of
from softprompt.errors import DataError
from tiny_models import tiny_tokenizer

TWEET = Template.parse("Tweet: {text} Complaint? {label}", target="label", length=3)
ROW = Example({"text": "my order never came", "label": "complaint"}, row=4)


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def tok_bos() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(bos=True)


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    """SentencePiece as Llama 2 has it: a text is read as if a space stood before it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    corpus = ["my order never came Tweet: Complaint? complaint no the and =\n"] * 4
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def real(one: Encoded) -> list[int]:
    return [token for token, row in zip(one.ids, one.soft, strict=True) if row < 0]


def trained(one: Encoded) -> list[int]:
    return [token for token, learned in zip(one.ids, one.trained, strict=True) if learned]


def done(template: Template, example: Example, tokenizer: Any, **options: Any) -> Encoded:
    one = encode(template, example, tokenizer, **options)
    assert one is not None
    return one


def test_plain_text_is_laid_out_as_peft_does_prompt_then_the_tokenizers_own_ids(tok_bos: Any) -> None:
    one = done(Template.parse("{soft:4}{text}"), Example({"text": "The quick fox."}), tok_bos)
    own = tok_bos("The quick fox.")["input_ids"]
    assert own[0] == tok_bos.bos_token_id
    assert one.ids == [0] * 4 + own
    assert one.soft == [0, 1, 2, 3] + [-1] * len(own)
    assert one.trained == [False] * 4 + [False] + [True] * (len(own) - 1)  # <s> is never trained
    assert one.text_bytes == len("The quick fox.")


def test_the_target_alone_is_trained_with_the_space_before_it_and_an_end_token(tok: Any) -> None:
    one = done(TWEET, ROW, tok)
    context = tok("Tweet: my order never came Complaint?")["input_ids"]
    target = [*tok(" complaint")["input_ids"], tok.eos_token_id]
    assert real(one) == context + target
    assert trained(one) == target
    assert one.text_bytes == len(" complaint")


def test_fixed_text_after_the_target_is_learned_with_it(tok: Any) -> None:
    template = Template.parse("{text} => {label}.", target="label", length=2)
    assert tok.decode(trained(done(template, ROW, tok, end="never"))) == " complaint."


def test_labels_go_by_place_even_where_the_text_holds_the_end_token(tok: Any) -> None:
    one = done(Template.parse("{soft:1}{text}"), Example({"text": "a</s>b"}), tok, special_tokens=True)
    assert tok.eos_token_id in real(one)
    assert one.trained_tokens == len(real(one))


def test_slots_anywhere_take_the_prompts_rows_in_order(tok: Any) -> None:
    template = Template.parse("Tweet: {text}{soft:2} Complaint?{soft:3} {label}", target="label")
    one = done(template, ROW, tok)
    assert [row for row in one.soft if row >= 0] == [0, 1, 2, 3, 4]
    runs = ["Tweet: my order never came", " Complaint?", " complaint"]
    assert real(one) == [i for run in runs for i in tok(run)["input_ids"]] + [tok.eos_token_id]


@pytest.mark.parametrize("end", ["auto", "always", "never"])
def test_the_end_token_follows_a_target_but_not_plain_text_unless_wanted(tok: Any, end: Any) -> None:
    text = Template.parse("{soft:2}{text}")
    assert (trained(done(TWEET, ROW, tok, end=end))[-1] == tok.eos_token_id) is (end != "never")
    assert (trained(done(text, ROW, tok, end=end))[-1] == tok.eos_token_id) is (end == "always")


def test_a_tokenizer_that_closes_its_texts_closes_them_here_too(tok: Any) -> None:
    backend = Tokenizer.from_str(tok.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    closing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    template = Template.parse("{text}{soft:2} {text}")
    run = tok("The fox")["input_ids"], tok(" The fox")["input_ids"]
    one = done(template, Example({"text": "The fox"}), closing)
    assert real(one) == [2, *run[0], *run[1], 1]
    assert 1 not in real(done(template, Example({"text": "The fox"}), closing, view=to_answer))


TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<"), max_size=40)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    TEXTS,
    TEXTS.filter(str.strip),
    st.sampled_from(["{a}{b}", "{a} {b}", "Q: {a}\n\nA:\n{b}", "{a}{soft:2} {b}", "{soft:2}{b}"]),
)
def test_generation_reads_exactly_what_training_read(tok_bos: Any, a: str, b: str, source: str) -> None:
    template = Template.parse(source, target="b", length=None if "soft" in source else 2)
    row = Example({"a": a, "b": b})
    learned = done(template, row, tok_bos)
    asked = done(template, Example({"a": a}), tok_bos, view=to_answer)
    first = learned.trained.index(True)
    assert asked.ids == learned.ids[:first]
    assert asked.soft == learned.soft[:first]
    assert all(learned.trained[first:])
    text = source.replace("{soft:2}", "").replace("{a}", a).replace("{b}", b)
    assert tok_bos.decode(real(learned)) == "<s>" + text + "</s>"


@pytest.mark.parametrize("source", ["{a}\n {b}", "{a}\n{b}", "Q: {a}\n\nA:\n{b}"])
def test_an_answer_does_not_begin_with_the_line_break_before_it(tok: Any, source: str) -> None:
    """Who reads one line of what is generated would else read an empty one; the tokens are those of the text as it stands."""
    learned = done(
        Template.parse(source, target="b", length=2), Example({"a": "the fox", "b": "delivery"}), tok
    )
    first = learned.trained.index(True)
    answer = tok.decode(learned.ids[first:], skip_special_tokens=True)
    assert answer == source[source.rindex("\n") + 1 :].replace("{b}", "delivery")
    text = source.replace("{a}", "the fox").replace("{b}", "delivery")
    assert [one for one in real(learned) if one != tok.eos_token_id] == tok(text)["input_ids"]


def test_plain_text_keeps_its_trailing_space_for_generation(tok: Any) -> None:
    one = done(Template.parse("{soft:2}{text}"), Example({"text": "as a logistician. "}), tok, view=to_answer)
    assert real(one) == tok("as a logistician. ")["input_ids"]
    assert one.trained_tokens == 0


def test_the_base_alone_reads_the_same_tokens_without_the_slots(tok: Any) -> None:
    with_slots, without = done(TWEET, ROW, tok), done(TWEET, ROW, tok, slots=False)
    assert without.ids == real(with_slots)
    assert set(without.soft) == {-1}
    assert trained(without) == trained(with_slots)


def test_score_first_off_scores_the_same_tokens_with_a_prompt_and_without(tok: Any, tok_bos: Any) -> None:
    template, row = Template.parse("{soft:4}{text}"), Example({"text": "The quick fox."})
    for tokenizer in (tok, tok_bos):
        tuned = done(template, row, tokenizer, view=to_judge)
        base = done(template, row, tokenizer, slots=False)
        assert trained(tuned) == trained(base)
        assert tuned.text_bytes == base.text_bytes
    assert trained(done(template, row, tok)) == tok("The quick fox.")["input_ids"]
    assert done(template, row, tok, slots=False).text_bytes == len("The quick fox.") - len(
        tok.decode(tok("The quick fox.")["input_ids"][:1])
    )


def test_nothing_predicts_the_very_first_position_so_it_is_not_trained(tok: Any) -> None:
    one = done(Template.parse("{text}{soft:2} and"), Example({"text": "fox"}), tok)
    assert one.trained[0] is False
    with pytest.raises(Unlabelled, match="is the first"):
        encode(Template.parse("{text}"), Example({"text": "a"}), tok)


def test_a_run_in_the_middle_gets_no_space_of_the_tokenizers_own(llama_like: Any) -> None:
    assert special_tokens_of(llama_like).leading_space
    one = done(Template.parse("{text}{soft:1}{label}", target="label"), ROW, llama_like, end="never")
    assert llama_like.decode(real(one), skip_special_tokens=True) == "my order never camecomplaint"
    whole = done(TWEET, ROW, llama_like, end="never")
    assert real(whole) == llama_like("Tweet: my order never came Complaint? complaint")["input_ids"]


def test_too_long_a_row_is_refused_with_all_three_ways_out(tok: Any) -> None:
    row = Example({"text": "a " * 100}, row=17)
    with pytest.raises(TooLong) as refused:
        encode(Template.parse("{soft:4}{text}"), row, tok, max_length=50)
    message = str(refused.value)
    found = 4 + len(tok("a " * 100)["input_ids"])
    for part in ("row 17", str(found), "4 virtual", "limit is 50", "truncate", "drop", "data.max_length"):
        assert part in message


def test_truncation_takes_the_end_of_the_longest_field_and_never_the_target(tok: Any) -> None:
    words = "the quick brown fox jumps over the lazy dog " * 5
    row = Example({"text": words, "label": "complaint"})
    one = done(TWEET, row, tok, max_length=40, on_overflow="truncate")
    assert len(one) <= 40
    assert tok.decode(trained(one)) == " complaint</s>"
    text = tok.decode(real(one))
    assert text.startswith("Tweet: the quick")
    assert text.endswith(" Complaint? complaint</s>")
    kept = text.removeprefix("Tweet: ").removesuffix(" Complaint? complaint</s>")
    assert words.startswith(kept)
    assert one.cut == len(done(TWEET, row, tok)) - len(one)
    longer = done(TWEET, Example({"text": words[: len(kept) + 8], "label": "complaint"}), tok)
    assert len(longer) > 40 - 2  # as much as fits was kept


def test_plain_text_that_was_cut_is_not_taught_to_end_there(tok: Any) -> None:
    template = Template.parse("{soft:2}{text}")
    one = done(
        template, Example({"text": "fox " * 50}), tok, max_length=20, on_overflow="truncate", end="always"
    )
    assert len(one) == 20
    assert tok.eos_token_id not in one.ids


def test_what_cannot_be_shortened_is_refused_even_when_truncating(tok: Any) -> None:
    row = Example({"text": "hi", "label": "a label that is much too long"})
    with pytest.raises(TooLong, match="Fixed text and target alone"):
        encode(TWEET, row, tok, max_length=20, on_overflow="truncate")


def test_every_cut_and_dropped_row_is_counted(tok: Any) -> None:
    template = Template.parse("{soft:2}{text}")
    rows = [Example({"text": "fox " * n}, row=n) for n in (1, 50, 2, 60)]
    kept = encode_all(template, rows, tok, max_length=20, on_overflow="drop")
    assert [one.row for one in kept.encoded] == [1, 2]
    assert (kept.dropped, kept.truncated) == (2, 0)
    cut = encode_all(template, rows, tok, max_length=20, on_overflow="truncate")
    assert (len(cut.encoded), cut.dropped, cut.truncated) == (4, 0, 2)
    whole = encode_all(template, rows, tok)
    assert cut.cut_tokens == sum(whole.lengths) - sum(cut.lengths)
    with pytest.raises(DataError, match="No row is left: all 2"):
        encode_all(template, [rows[1], rows[3]], tok, max_length=20, on_overflow="drop")


@pytest.mark.parametrize(
    ("template", "fields", "says"),
    [
        (TWEET, {"text": "hi", "label": " "}, "target {label} is empty"),
        (Template.parse("{soft:1}a {text}"), {"text": ""}, "text is empty"),
    ],
)
def test_a_row_without_a_token_to_learn_is_an_error(
    tok: Any, template: Template, fields: Any, says: str
) -> None:
    with pytest.raises(Unlabelled, match=says.replace("{", r"\{").replace("}", r"\}")):
        encode(template, Example(fields, row=3), tok)


def test_a_missing_field_names_those_that_are_there(tok: Any) -> None:
    with pytest.raises(DataError, match=r"row 3.*\{text\}; it has: Text, label\. Did you mean 'Text'"):
        encode(TWEET, Example({"Text": "hi", "label": "x"}, row=3), tok)


def test_always_ending_needs_an_end_token(tok: Any) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tok.backend_tokenizer)
    with pytest.raises(DataError, match="no end token"):
        encode(TWEET, ROW, endless, end="always")
    assert tok.decode(trained(done(TWEET, ROW, endless))) == " complaint"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if not loop.last %}{{ m['content'] | upper }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
CHAT = Example(
    {},
    (
        Message("system", "Be brief."),
        Message("user", "my order never came"),
        Message("assistant", "I am sorry."),
        Message("user", "nobody answers!"),
        Message("assistant", "thank you for the help"),
    ),
    row=2,
)
SOFT_CHAT = Template.parse("{soft:2}{messages}")


def chatty(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def test_in_a_chat_the_assistants_turns_are_trained_with_their_closing_mark() -> None:
    tokenizer = chatty(CHATML)
    one = done(SOFT_CHAT, CHAT, tokenizer)
    assert tokenizer.decode(trained(one)) == "I am sorry.<|im_end|>thank you for the help<|im_end|>"
    assert one.text_bytes == len("I am sorry.") + len("thank you for the help")
    messages = [{"role": m.role, "content": m.content} for m in CHAT.messages or ()]
    own = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert real(one) == own[: len(real(one))]
    assert tokenizer.decode(own[len(real(one)) :]) == "\n"  # the tail behind the last mark teaches nothing


def test_a_chats_generation_reads_what_training_read() -> None:
    for template in (CHATML, PLAIN):
        tokenizer = chatty(template)
        learned = done(SOFT_CHAT, CHAT, tokenizer)
        asked = done(SOFT_CHAT, CHAT, tokenizer, view=to_answer)
        assert asked.ids == learned.ids[: len(asked)]
        assert learned.trained[len(asked) :] == [True] * (len(learned) - len(asked))
        messages = [{"role": m.role, "content": m.content} for m in (CHAT.messages or ())[:-1]]
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(real(asked)) == own


def test_marks_of_the_template_serve_where_it_rewrites_earlier_turns() -> None:
    tokenizer = chatty(MARKED)
    messages = [{"role": m.role, "content": m.content} for m in CHAT.messages or ()]
    own = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    expected = [i for i, mine in zip(own["input_ids"], own["assistant_masks"], strict=True) if mine]
    one = done(SOFT_CHAT, CHAT, tokenizer)
    assert trained(one) == expected
    assert tokenizer.decode(expected) == "I AM SORRY.<|im_end|>thank you for the help<|im_end|>"


def test_a_template_that_rewrites_turns_without_marks_is_refused() -> None:
    unmarked = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match=r"row 2.*cannot be distinguished.*one assistant turn a row"):
        encode(SOFT_CHAT, CHAT, chatty(unmarked))
    once = Example({}, (CHAT.messages or ())[:3])
    assert done(SOFT_CHAT, once, chatty(unmarked)).trained_tokens > 0


def test_a_chat_whose_turns_end_without_a_mark_gets_the_end_token() -> None:
    tokenizer = chatty("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
                       "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    once = Example({}, (CHAT.messages or ())[:3])
    assert tokenizer.decode(trained(done(SOFT_CHAT, once, tokenizer))) == "I am sorry.</s>"
    assert tokenizer.decode(trained(done(SOFT_CHAT, once, chatty(CHATML)))) == "I am sorry.<|im_end|>"


def test_a_long_chat_loses_its_oldest_turns_but_not_the_systems() -> None:
    tokenizer = chatty(CHATML)
    short = Example({}, ((CHAT.messages or ())[0], *(CHAT.messages or ())[3:]))
    limit = len(done(SOFT_CHAT, short, tokenizer))
    one = done(SOFT_CHAT, CHAT, tokenizer, max_length=limit, on_overflow="truncate")
    assert one.ids == done(SOFT_CHAT, short, tokenizer).ids
    assert one.cut == len(done(SOFT_CHAT, CHAT, tokenizer)) - limit
    with pytest.raises(TooLong, match="last exchange alone"):
        encode(SOFT_CHAT, CHAT, tokenizer, max_length=limit - 1, on_overflow="truncate")


@pytest.mark.parametrize(
    ("example", "template", "says"),
    [
        (Example({"text": "a"}, row=1), CHATML, "row 1.*has no chat messages"),
        (Example({}, (Message("user", "hi"),), row=1), CHATML, "no turn of the role 'assistant' says"),
        (
            Example({}, (Message("user", "hi"), Message("assistant", " "))),
            CHATML,
            "no turn of the role 'assistant' says",
        ),
        (CHAT, "{{ raise_exception('no system role, please') }}", "row 2.*refuses.*no system role, please"),
        (CHAT, None, "no chat template"),
    ],
)
def test_chats_that_cannot_be_laid_out_are_refused(example: Example, template: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        encode(SOFT_CHAT, example, chatty(template))


def test_a_batch_is_filled_up_on_the_right_and_learns_nothing_there(tok: Any) -> None:
    rows = [done(TWEET, ROW, tok), done(TWEET, Example({"text": "a", "label": "b"}, row=9), tok)]
    batch = collate(rows, pad_id=5)
    S = max(len(one) for one in rows)
    assert batch.ids_BS.shape == batch.soft_BS.shape == batch.trained_BS.shape == (2, S)
    assert batch.ids_BS.dtype == batch.soft_BS.dtype == torch.int64
    assert batch.lengths_B.tolist() == [len(one) for one in rows]
    assert batch.rows == (4, 9)
    for b, one in enumerate(rows):
        assert batch.ids_BS[b].tolist() == one.ids + [5] * (S - len(one))
        assert batch.soft_BS[b].tolist() == one.soft + [-1] * (S - len(one))
        assert batch.trained_BS[b].tolist() == one.trained + [False] * (S - len(one))
    assert batch.text_bytes == len(" complaint") + len(" b")
    assert batch.to("cpu").rows == batch.rows


@given(st.lists(st.integers(1, 500), min_size=1, max_size=80), st.integers(1, 9), st.integers(0, 3))
def test_an_epoch_takes_every_row_once_in_full_batches_but_one(
    lengths: list[int], size: int, seed: int
) -> None:
    batches = epoch_order(lengths, size, seed=seed, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    full, rest = divmod(len(lengths), size)
    assert sizes == [size] * full + ([rest] if rest else [])
    assert batches == epoch_order(lengths, size, seed=seed, epoch=1)


def test_epochs_differ_and_rows_of_alike_length_come_together() -> None:
    lengths = [(i * 37) % 400 + 20 for i in range(400)]
    orders = [epoch_order(lengths, 8, seed=0, epoch=epoch) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert {frozenset(batch) for batch in orders[0]} != {frozenset(batch) for batch in orders[1]}
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in orders[0])
    assert padded < 1.1 * sum(lengths)
    longest_first = [max(lengths[i] for i in batch) for batch in orders[0]]
    assert longest_first != sorted(longest_first)


@pytest.mark.parametrize("name", ["bloom-6.8m-draft", "TinyStories-656K"])
def test_real_rows_on_real_tokenizers_read_alike_in_training_and_generation(
    shared_data: Path, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "weights" / name)
    sets = [
        (load_splits(shared_data / "banking77", limit=60), "{soft:4} {text} Intent: {category}", "category"),
        (load_splits(shared_data / "gsm8k", limit=60), "{question}{soft:4}\nAnswer:\n{answer}", "answer"),
        (load_splits(shared_data / "e2e_nlg/devset.csv", limit=60), "{soft:4}{mr} => {ref}", "ref"),
    ]
    for splits, source, target in sets:
        template = Template.parse(source, target=target)
        for example in splits.train:
            learned = done(template, example, tokenizer)
            asked = done(template, example, tokenizer, view=to_answer)
            assert asked.ids == learned.ids[: len(asked)]
            assert learned.trained == [False] * len(asked) + [True] * (len(learned) - len(asked))
            assert learned.ids[-1] == tokenizer.eos_token_id


def test_the_tutorials_fifty_rows_have_the_tokens_that_the_tokenizer_gives(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "weights/bloom-6.8m-draft")
    splits = load_splits(shared_data / "awesome-chatgpt-prompts/prompts.csv", column="prompt", limit=50)
    found = encode_all(Template.parse("{text}", length=4), splits.train, tokenizer)
    own = [tokenizer(example.fields["prompt"])["input_ids"] for example in splits.train]
    assert [one.ids[4:] for one in found.encoded] == own
    assert sum(one.trained_tokens for one in found.encoded) == sum(map(len, own))


def test_encoded_rows_in_arrays_are_the_rows_themselves(tok: Any) -> None:
    examples = [
        Example({"text": "my order never came " * n, "label": f"complaint {n}"}, row=7 * n)
        for n in range(1, 9)
    ]
    one_by_one = [done(TWEET, example, tok, max_length=30, on_overflow="truncate") for example in examples]
    rows = encode_all(TWEET, examples, tok, max_length=30, on_overflow="truncate").encoded
    assert list(rows) == one_by_one
    assert rows == one_by_one
    assert rows != one_by_one[:-1]
    assert [rows[-1], rows[3], *rows[2:5]] == [one_by_one[-1], one_by_one[3], *one_by_one[2:5]]
    assert rows.lengths == [len(row) for row in one_by_one]
    assert all(type(learned) is bool for learned in rows[0].trained)
    assert sum(row.cut for row in rows) > 0
    with pytest.raises(IndexError):
        rows[len(one_by_one)]


def test_many_rows_take_nine_bytes_a_position() -> None:
    row = Encoded(list(range(1000, 1040)), [-1] * 40, [True] * 40, 5, 80)
    tracemalloc.start()
    rows = EncodedRows(row for _ in range(20_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    positions = sum(rows.lengths)
    assert positions == 800_000
    assert held < 1.25 * (9 * positions + 48 * len(rows))  # arrays grow by an eighth more than they hold
