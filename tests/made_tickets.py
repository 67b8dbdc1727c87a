"""Two data sets as a support team would bring them, made up: 400 messy conversations, and tickets with their category.

    python tests/made_tickets.py FOLDER    # support.json (ShareGPT), tickets.csv (text, label)

The same files each time; `qlora_nb/embedded/support.json` is the first of them. All names in them are invented.
"""

import csv
import json
import random
import sys
from pathlib import Path

NAMES = (
    "Ana Ben Chloé Dmitri Esra Farid Greta Hiro Inês Jonas Kemi Lena Mateo Nour Olga Priya Quinn Rosa Sam Tomás".split()
)
AGENTS = ("Mira", "Jo", "Elif", "Pat")

# topic: (ways to ask, what is wrong in a clause, steps that solve it)
TOPICS = {
    "password": (
        [
            "I can't log in, it says wrong password, but I'm sure it's right.",
            "how do i reset my password",
            "The reset mail never arrives. I've tried three times.",
            "Locked out after the holidays, please help.",
            "New phone, and now the login wants a code that I don't have.",
        ],
        "you can't log in",
        [
            "Open kestrel.example/reset and enter the address of your account.",
            "Use the link in the mail within 30 minutes; look into the spam folder, too.",
            "If no mail arrives in ten minutes, reply here and we set a password for you.",
        ],
    ),
    "invoice": (
        [
            "Where do I find last month's invoice?",
            "We need an invoice with our VAT number on it, our accountant is asking.",
            "Invoice shows the old address. Can you change that??",
            "Can I get all invoices of 2024 as PDF?",
            "The invoice is made out to the wrong company.",
        ],
        "your invoice isn't what you need",
        [
            "Go to Settings, Billing, Invoices.",
            "Enter address and VAT number under Billing details and press Save.",
            "Press Reissue beside the invoice: the new PDF replaces the old one.",
        ],
    ),
    "refund": (
        [
            "I was charged twice this month!",
            "Please refund the yearly plan, we only wanted monthly.",
            "There's a charge of 49 EUR that I don't recognise.",
            "We cancelled in May and you still charged us in June.",
            "My card was charged, but the plan says unpaid.",
        ],
        "you were charged wrongly",
        [
            "We have checked the payment and started the refund.",
            "It is on your card in five working days.",
            "If it isn't, send us the last four digits of the card.",
        ],
    ),
    "export": (
        [
            "Is there a way to export everything to Excel?",
            "CSV export gives me question marks instead of ü and ß",
            "The export stops at 1000 rows.",
            "Our accountant can't open the file that Kestrel exports.",
            "Need the raw data of the last three years as a table.",
        ],
        "the export doesn't give what you need",
        [
            "Open Reports and choose Export.",
            "Choose CSV (UTF-8), and All rows in place of This page.",
            "In Excel open it with Data, From text, so that the letters stay right.",
        ],
    ),
    "sync": (
        [
            "The phone app doesn't show what I entered on the laptop.",
            "sync broken since the update",
            "My colleague sees other figures than I do.",
            "Entries from yesterday are missing on the tablet.",
            "Offline entries never turn up on the web.",
        ],
        "your devices show different figures",
        [
            "Pull down the list in the app to sync at once.",
            "Look under Settings, Sync: the last time should be a minute ago or less.",
            "If it is older, log out and in again; nothing is lost by that.",
        ],
    ),
    "users": (
        [
            "How can I add a colleague to our account?",
            "Someone left the company. How do we remove his access?",
            "Can my tax adviser get read-only access?",
            "What does it cost to have a second person in the account?",
            "Our intern should see reports but change nothing.",
        ],
        "you want to change who has access",
        [
            "Open Settings, Team.",
            "Press Invite, or the three dots beside a name to change or end access.",
            "For an adviser choose the role Viewer: it can read and export, nothing else.",
        ],
    ),
    "slow": (
        [
            "The dashboard takes a minute to load.",
            "Everything is very slow today, is there a problem?",
            "Search takes forever since we imported the old data.",
            "Pages hang for half a minute in the morning.",
            "Saving an entry takes ages.",
        ],
        "Kestrel is slow for you",
        [
            "Look at status.kestrel.example: a disturbance is shown there.",
            "Set the dashboard to the current year under View.",
            "If it stays slow, send us the time and what you clicked.",
        ],
    ),
    "cancel": (
        [
            "I want to cancel my subscription.",
            "We're closing the business, please delete our account and all data.",
            "how do i stop the renewal",
            "We move to other software next month. What happens to our data?",
            "End our contract, please.",
        ],
        "you want to leave",
        [
            "Open Settings, Billing and press Cancel plan; it ends with the paid period.",
            "Export your data before that day.",
            "We delete all of it 30 days later, and confirm that by mail.",
        ],
    ),
}

OTHER_LANGUAGES = [
    ("Wo finde ich meine Rechnung?", "Rechnungen liegen unter Einstellungen, Abrechnung, Rechnungen."),
    ("Mein Passwort geht nicht mehr 😕", "Unter kestrel.example/reset setzen Sie ein neues; der Link gilt 30 Minuten."),
    ("¿Cómo cancelo mi suscripción?", "En Ajustes, Facturación, pulse Cancelar plan; termina con el periodo pagado."),
    ("L'export CSV est illisible (é devient Ã©).", "Choisissez CSV (UTF-8) dans Rapports, Exporter."),
    ("同期されません。", "設定の「同期」を開き、一度ログアウトしてからログインしてください。"),
]
SIGNATURES = [
    "\n\n--\nSent from my iPhone",
    "\n\nKind regards\nDr. Lena Vogt | Vogt & Partner mbB | Tel. +49 30 5550100",
    "\n\nThis e-mail and any attachments are confidential. If you are not the intended recipient, please delete it.",
    "\n\nOn Mon, 3 Mar 2025 at 09:14, Kestrel Support <help@kestrel.example> wrote:\n> Hi, how can we help?\n> Mira",
]


def reply(chance, name, topic):
    "An answer in the team's form: a greeting, the matter, numbered steps, ticket and agent."
    _, matter, steps = TOPICS[topic]
    listed = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    ticket = f"[KS-{chance.randint(10000, 99999)}]"
    signed = f"Best,\n{chance.choice(AGENTS)} from Kestrel {ticket}"
    return f"Hi {name},\n\nsorry that {matter}. This solves it:\n\n{listed}\n\n{signed}"


def question(chance, name, topic):
    "A customer's words: sometimes with HTML, a signature or an emoji around them."
    text = chance.choice(TOPICS[topic][0])
    kind = chance.randrange(10)
    if kind < 2:
        text = f"<p>Hello,</p><p>{text}</p><br>&nbsp;<div class='sig'>{name}</div>"
    elif kind < 5:
        text = f"Hello,\n\n{text}\n{name}{chance.choice(SIGNATURES)}"
    elif kind < 7:
        text = f"{text} {chance.choice('😡🙏😅👍')}\n{name}"
    else:
        text = f"{text}\n\n{name}"
    return text


def talk(*turns):
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def clean_row(chance):
    "A question and its answer, now and then with thanks and a second question."
    name, topic = chance.choice(NAMES), chance.choice(list(TOPICS))
    turns = [("human", question(chance, name, topic)), ("gpt", reply(chance, name, topic))]
    if chance.random() < 0.2:
        more = chance.choice([other for other in TOPICS if other != topic])
        turns += [
            ("human", f"Thanks! One more thing: {chance.choice(TOPICS[more][0])}"),
            ("gpt", reply(chance, name, more)),
        ]
    if chance.random() < 0.1:
        turns.insert(0, ("system", "You are Kestrel's support."))
    return talk(*turns)


def faulty_rows(chance):
    "Rows as exports of a help desk have them: by kind, some of each."
    name, topic = "Ana", "invoice"
    asked, answered = question(chance, name, topic), reply(chance, name, topic)
    log = "\n".join(f"2025-03-{i % 28 + 1:02d} 09:{i % 60:02d}:00 ERROR sync worker {i}: timeout" for i in range(150))
    made = [talk(("human", ask), ("gpt", answer)) for ask, answer in OTHER_LANGUAGES for _ in range(4)]
    made += [talk(("human", asked), ("gpt", ""))] * 3  # nobody answered
    made += [talk(("human", ""), ("gpt", answered))] * 3
    made += [talk(("human", asked))] * 3  # still open
    made += [talk(("human", asked), ("human", "Anyone there?"), ("gpt", answered)) for _ in range(4)]
    made += [talk(("human", f"Sync fails, here is our log:\n{log}"), ("gpt", reply(chance, name, "sync")))] * 2
    made += [talk(("human", asked), ("gpt", f"{answered}\n\n<|im_end|>"))] * 2  # from another model's export
    made += [talk(("human", asked), ("gpt", "TODO"))] * 2
    made += [talk(("human", f"My login is {name.lower()}@vogt.example, password Sommer2024!"), ("gpt", answered))] * 3
    return made


def support_rows(number=400, seed=0):
    "The conversations: mostly usable, a tenth faulty, a tenth twice, in no order."
    chance = random.Random(seed)
    made = faulty_rows(chance)
    double = number // 10
    made += [clean_row(chance) for _ in range(number - len(made) - double)]
    made += [json.loads(json.dumps(row)) for row in chance.sample(made, double)]
    chance.shuffle(made)
    return made


LABELS = {  # label: ways to say it
    "login": "can't log in|forgot my password|the reset link doesn't work|two-factor code never arrives",
    "billing": "charged twice|invoice has the wrong address|need a receipt with VAT|unknown charge on my card",
    "bug": "the app crashes when I save|export shows question marks|the totals don't add up|sync stopped working",
    "feature": "please add a dark mode|it would be great to export to Excel|can you support Swiss francs",
    "cancel": "I want to cancel|please delete our account|stop the renewal|we're moving to another tool",
    "howto": "how do I add a colleague|where do I find reports|how can I import old data|how do I change the language",
}
FRAMES = [
    "{}",
    "Hi, {}",
    "{} :(",
    "Hello team, {}. Thanks, {name}",
    "URGENT: {}!!",
    "since yesterday: {}",
    "<p>{}</p>",
    "Hi there\n{}\n{name}",
]


def ticket_rows(number=480, seed=0):
    "(text, label) of each ticket; one label in thirty is wrong, as people label."
    chance = random.Random(seed)
    made = []
    for _ in range(number):
        label = chance.choice(list(LABELS))
        text = chance.choice(FRAMES).format(chance.choice(LABELS[label].split("|")), name=chance.choice(NAMES))
        made.append((text, chance.choice(list(LABELS)) if chance.random() < 1 / 30 else label))
    return made


def write_support(path):
    Path(path).write_text(json.dumps(support_rows(), ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_tickets(path, head=("text", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *ticket_rows()])
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(write_support(folder / "support.json"), write_tickets(folder / "tickets.csv"), sep="\n")
