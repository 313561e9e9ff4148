"""Distillation of three kinds of long text: how near a short prompt comes, what it costs, and what compaction alone gives.

    python benchmarks/distil.py --base bases/smollm2 --data ../shared/data --seeds 3 --out benchmarks/distil_smollm2.jsonl

few-shot    28 labelled SNIPS requests; answers are labels
instruction rules by which a bank's messages go to six teams, with examples; the messages are Banking77's, answers are teams
document    an article of the CIA World Factbook; the base writes the questions itself
page        the same with pages of this repository's documentation

Nobody's labels are learned from; they are only compared with. KL is that of the teacher's probabilities from the student's
at every token of its answers to held-out questions, over the teacher's 1,000 likeliest tokens and the rest as one (nats a
token). `cpu_seconds` is of the process and includes the teacher's answers, the start, the steps and the judging.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from softprompt import DistilSettings, FrozenLM, distil

INSTRUCTION = """You sort the messages that customers send to a bank. Each message goes to one of six teams. Read the whole message, decide what the customer wants to have done, and answer with the name of the team alone.

The teams and their rules:

1. delivery. Everything about getting a new card into the customer's hands: ordering a card, a second or spare card, when it will come, how it is tracked, where it can be sent, how it is activated, a card that is about to expire. A card that has come but does not work does not belong here.
Message: I ordered my card ten days ago and it is still not here.
Team: delivery
###

2. security. Cards and phones that are lost or stolen, cards that a machine has kept, a blocked or forgotten PIN or passcode, payments and withdrawals that the customer did not make, and proof of who the customer is. If somebody else may have the card, the message belongs here, whatever else it says.
Message: My wallet was stolen this morning with the card in it.
Team: security
###
Message: Why do you need a photograph of my passport?
Team: security
###

3. cash. Notes from a cash machine: withdrawals that were declined, that are still pending, that gave a wrong amount, what a withdrawal costs, and which machines take the card. The rate that was used for cash abroad belongs here too.
Message: The machine gave me 20 instead of 100.
Team: cash
###

4. topup. Money that the customer puts into the account: by card, by bank transfer, by cheque, by cash or automatically; a top-up that is pending, that failed, that was reverted, its limits and its fees.
Message: My top-up has been pending since yesterday.
Team: topup
###

5. transfer. Money that goes from the account to a person or another account, or comes from one: how long it takes, why it failed or was declined, how it is cancelled, who may receive it, and what it costs.
Message: How long does a transfer to Spain take?
Team: transfer
###

6. exchange. Other currencies: which ones can be held, how money is changed in the app, which rate is used, and what changing costs. Rates of payments with the card belong here as well.
Message: What rate do I get when I change pounds into euros?
Team: exchange
###

If two teams seem right, take the one whose work comes first: security before all others, then cash, then the rest. Never answer with two teams, never explain the choice, and never make up a seventh team. A greeting or a complaint in front of the question does not change the team. Write the name in small letters.
"""
TEAMS = {
    "delivery": "card_arrival card_delivery_estimate get_physical_card getting_spare_card order_physical_card activate_my_card "
    "card_about_to_expire",
    "security": "lost_or_stolen_card lost_or_stolen_phone compromised_card card_swallowed pin_blocked passcode_forgotten "
    "change_pin card_payment_not_recognised cash_withdrawal_not_recognised direct_debit_payment_not_recognised "
    "why_verify_identity unable_to_verify_identity verify_my_identity",
    "cash": "pending_cash_withdrawal wrong_amount_of_cash_received declined_cash_withdrawal cash_withdrawal_charge "
    "atm_support wrong_exchange_rate_for_cash_withdrawal",
    "topup": "automatic_top_up top_up_by_bank_transfer_charge pending_top_up top_up_limits top_up_reverted topping_up_by_card "
    "verify_top_up top_up_by_cash_or_cheque top_up_failed top_up_by_card_charge "
    "balance_not_updated_after_cheque_or_cash_deposit",
    "transfer": "cancel_transfer transfer_not_received_by_recipient declined_transfer pending_transfer transfer_timing "
    "beneficiary_not_allowed transfer_fee_charged failed_transfer transfer_into_account",
    "exchange": "exchange_rate card_payment_wrong_exchange_rate fiat_currency_support exchange_via_app exchange_charge",
}  # Banking77's intents, as the rules sort them


def few_shot(data: Path, folder: Path) -> dict[str, Any]:
    rows = []
    for path in sorted((data / "snips").glob("train_*_full.json")):
        ((intent, requests),) = json.loads(path.read_text(encoding="latin-1")).items()
        rows += [
            ("".join(part["text"] for part in request["data"]).strip(), intent) for request in requests[:100]
        ]
    random.Random(0).shuffle(rows)
    write(folder / "snips.csv", ("text", "intent"), rows[:564])
    return {
        "context": {"shots": 28},
        "data": {
            "source": str(folder / "snips.csv"),
            "target": "intent",
            "template": "Request: {text}\nIntent: {intent}",
            "validation": 24,
            "test": 300,
        },
        "distil": {"length": 32, "answer_tokens": 8, "temperature": 0.0},
    }


def instruction(data: Path, folder: Path) -> dict[str, Any]:
    team_of = {intent: team for team, intents in TEAMS.items() for intent in intents.split()}
    with (data / "banking77" / "train.csv").open(encoding="utf-8") as file:
        messages = [(row["text"].strip(), team_of.get(row["category"])) for row in csv.DictReader(file)]
    rows = [message for message in messages if message[1] is not None]
    random.Random(0).shuffle(rows)
    write(folder / "bank.csv", ("text", "team"), rows[:564])
    (folder / "rules.txt").write_text(INSTRUCTION, encoding="utf-8")
    return {
        "context": {"instruction": str(folder / "rules.txt")},
        "data": {
            "source": str(folder / "bank.csv"),
            "target": "team",
            "template": "Message: {text}\nTeam: {team}\n###\n",
            "validation": 24,
            "test": 300,
        },
        "distil": {"length": 32, "answer_tokens": 8, "temperature": 0.0},
    }


def document(data: Path, folder: Path) -> dict[str, Any]:
    with lzma.open(data / "pretrain" / "usgov_pd" / "factbook.jsonl.xz", "rt", encoding="utf-8") as file:
        articles = [json.loads(line).get("text", "") for _, line in zip(range(400), file, strict=False)]
    text = max(articles, key=lambda article: min(len(article), 3_000))[:3_000]
    return asked_by_the_base(text, folder)


def page(data: Path, folder: Path) -> dict[str, Any]:
    pages = Path(__file__).parent.parent / "docs"
    text = "".join((pages / name).read_text(encoding="utf-8") for name in ("how-it-works.md", "glossary.md"))
    return asked_by_the_base(text[:3_600], folder)


def asked_by_the_base(text: str, folder: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return {
        "context": {"document": str(folder / "text.txt")},
        "data": {"written": 160},
        "distil": {"length": 32, "answer_tokens": 32},
    }


KINDS = {"few-shot": few_shot, "instruction": instruction, "document": document, "page": page}
# Where the base writes the questions, time is better spent on more of them than on more steps (LOG.md).
STEPS = {"few-shot": 80, "instruction": 80, "document": 40, "page": 40}


def write(path: Path, header: tuple[str, ...], rows: list[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="without it 80, and 40 where the base writes the questions")
    parser.add_argument(
        "--work", type=Path, help="A folder for the runs; one that was killed goes on from there."
    )
    parser.add_argument(
        "--out", type=Path, help="A file of one JSON object a run; runs that are in it are not made again."
    )
    parser.add_argument("--set", nargs="*", default=[], help="settings that differ, such as distil.length=16")
    parser.add_argument("--note", default="", help="What else the machine did, for the record.")
    arguments = parser.parse_args()
    done = set()
    if arguments.out is not None and arguments.out.is_file():
        lines = arguments.out.read_text(encoding="utf-8").splitlines()
        done = {(run["kind"], run["seed"], *run.get("set", ())) for run in map(json.loads, lines)}
    lm = FrozenLM.load(arguments.base, dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(arguments.seeds):  # every kind once before any twice: what a stop leaves is of use
            for kind in arguments.kinds:
                if (kind, seed, *arguments.set) in done:
                    continue
                folder = (arguments.work or Path(temporary)) / "_".join([kind, *arguments.set])
                record = run(kind, seed, arguments, lm, folder)
                print(json.dumps(record), flush=True)
                if arguments.out is not None:
                    with arguments.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")


def run(kind: str, seed: int, arguments: argparse.Namespace, lm: FrozenLM, folder: Path) -> dict[str, Any]:
    """One distillation with everything that its record needs to be understood alone."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = arguments.steps or STEPS[kind]
    tune = {"epochs": 100, "max_steps": steps, "valid_every_steps": 40, "seed": seed}
    tree = KINDS[kind](arguments.data, folder)
    if "source" not in tree["data"]:
        tree["data"]["seed"] = seed  # of the questions that are written
    settings = DistilSettings(base=arguments.base, out=str(folder / str(seed)), tune=tune, **tree)
    settings = settings.changed(arguments.set)
    began = time.process_time()
    result = distil(settings, lm=lm, resume=arguments.work is not None)
    record = {
        **machine.describe(),
        "note": arguments.note,
        "dtype": arguments.dtype,
        "kind": kind,
        "seed": seed,
        "set": arguments.set,
        "cpu_seconds": time.process_time() - began,
        **result.to_record(),
    }
    del record["path"]
    return {**record, "base": Path(arguments.base).name}


if __name__ == "__main__":
    main()
