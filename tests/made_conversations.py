"""Conversations made at random, with all fields that a turn can have, and a look for what a row lost.

That look knows nothing of the package: every word holds a number of its own, and has to stand where it belongs."""

import html
import json
import re

WORDS = [
    "box",
    "é🙂",
    "",
    "x < y & z ",
    'say "no" ',
    "a\\b",
    "{k}",
    "stock ",
    "don't ",
    "a\nline ",
    "a\ttab ",
    "null",
    "A",
]
WORD = r"""[^\s"{}:]*\d{4,}"""  # what it is recognised by


class Maker:
    "Makes conversations from a random generator."

    def __init__(self, random):
        self.random = random
        self.made = 1000

    def word(self):
        self.made += 1
        return f"{self.random.choice(WORDS)}{self.made}"

    def text(self, most=4):
        return " ".join(self.word() for _ in range(self.random.randint(1, most)))

    def value(self, depth=0):
        kind = self.random.randrange(7 if depth < 2 else 5)
        if kind == 5:
            return [self.value(depth + 1) for _ in range(self.random.randrange(3))]
        if kind == 6:
            return {f"key_{self.word()}": self.value(depth + 1) for _ in range(self.random.randrange(3))}
        self.made += 1
        return [self.text(2), self.made, self.random.random() < 0.5, None, self.made + 0.5][kind]

    def tool(self):
        self.made += 1
        field = {"type": "string", "description": self.text()}
        parameters = {"type": "object", "properties": {f"p{self.made}": field}, "required": []}
        function = {"name": f"f{self.made}", "description": self.text(), "parameters": parameters}
        return {"type": "function", "function": function}

    def call(self, tools):
        self.made += 1
        name = tools[0]["function"]["name"] if tools else f"g{self.made}"
        arguments = {f"q{self.made}_{i}": self.value() for i in range(self.random.randrange(3))}
        return {
            "id": f"id{self.made:07}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }

    def reply(self):
        turn = {"role": "assistant", "content": self.text()}
        chance = self.random.random()
        if chance < 0.25:
            turn["reasoning_content"] = self.text()
        elif chance < 0.4:
            turn["content"] = f"<think>\n{self.text()}\n</think>\n\n{turn['content']}"
        if self.random.random() < 0.15:
            turn["weight"] = self.random.choice([0, 1])
        return turn

    def calls(self, tools):
        calls = [self.call(tools) for _ in range(self.random.choice([1, 1, 1, 2]))]
        turn = {"role": "assistant", "content": self.random.choice(["", None, self.text()]), "tool_calls": calls}
        if self.random.random() < 0.2:
            turn["reasoning_content"] = self.text()
        yield turn
        for call in calls:
            said = self.text() if self.random.random() < 0.5 else json.dumps({"found": self.text(2)})
            yield {"role": "tool", "content": said, "tool_call_id": call["id"]}

    def conversation(self):
        "A conversation and its tools, or None."
        tools = [self.tool() for _ in range(self.random.randint(1, 2))] if self.random.random() < 0.4 else None
        turns = []
        if self.random.random() < 0.3:
            turns.append({"role": self.random.choice(["system", "developer"]), "content": self.text()})
        for _ in range(self.random.randint(1, 3)):
            turns.append({"role": "user", "content": self.text()})
            for _ in range(self.random.choice([0, 0, 0, 1, 2])):
                turns.extend(self.calls(tools))
            turns.append(self.reply())
        return turns, tools


def lost_words(tokenizer, messages, tools, row):
    "The words of a conversation that are not where they belong: replies in what is learned, all else anywhere."
    rows = (row, *row.parts)
    read = "\0".join(tokenizer.decode(one.input_ids) for one in rows)
    learned = "\0".join(tokenizer.decode([label for label in one.labels if label != -100]) for one in rows)
    last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1))
    for turn in messages[: last + 1]:
        is_learned = turn["role"] == "assistant" and turn.get("weight", 1)
        where = learned if is_learned else read
        content = turn.get("content") or ""
        if not is_learned:
            content = content.split("</think>")[-1]  # the reasoning of what isn't learned is the template's affair
        yield from (word for word in re.findall(WORD, content) if not any(f in where for f in quoted(word)))
        said = turn.get("reasoning_content") if is_learned else ""
        yield from (word for word in re.findall(WORD, said or "") if not any(f in where for f in quoted(word)))
        calls = json.dumps([call["function"] for call in turn.get("tool_calls") or ()], ensure_ascii=False)
        yield from (number for number in re.findall(r"\d{4,}", calls) if number not in where)
    yield from (number for number in re.findall(r"\d{4,}", json.dumps(tools, ensure_ascii=False)) if number not in read)


def quoted(word):
    "A word as templates may write it."
    return word, json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1], html.escape(word)
