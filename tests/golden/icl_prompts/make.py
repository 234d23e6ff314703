"""Makes digests.json: prompts of the four sets as transformers' GPT-2 tokenizer has them, built here by hand.

python tests/golden/icl_prompts/make.py DATA
with transformers 5.24.0; DATA holds the folders sst2, trec, agnews, emoc, gpt2_bpe.

Of each set the first training example of each class in turn, then the first test example. The texts are not
stored, only what their tokens are: a digest of the ids, their number, and where the label words begin.
"""

import csv
import hashlib
import json
import sys
from pathlib import Path

from transformers import GPT2Tokenizer

DATA = Path(sys.argv[1])


def sst2():
    def rows(name):
        lines = (DATA / "sst2" / name).read_text(encoding="utf-8").split("\n")[1:]
        return [(line.split("\t")[0].strip(), int(line.split("\t")[1])) for line in lines if line]

    return "Review: ", "\nSentiment:", ["Negative", "Positive"], rows("train.tsv"), rows("validation.tsv")


def trec():
    classes = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]

    def rows(name):
        lines = (DATA / "trec" / name).read_text(encoding="utf-8").split("\n")
        return [(x.split(" ", 1)[1].strip(), classes.index(x.split(":")[0])) for x in lines if x]

    words = ["Abbreviation", "Entity", "Description", "Person", "Location", "Number"]
    return "Question: ", "\nAnswer Type:", words, rows("train.txt"), rows("test.txt")


def agnews():
    with open(DATA / "agnews" / "train.csv", newline="", encoding="utf-8") as file:
        train = [(row[0].strip(), int(row[1])) for row in csv.reader(file)]
    with open(DATA / "agnews" / "test.csv", newline="", encoding="utf-8") as file:
        test = [(f"{row[1].strip()} {row[2].strip()}", int(row[0]) - 1) for row in list(csv.reader(file))[1:]]
    return "Article: ", "\nAnswer:", ["World", "Sports", "Business", "Technology"], train, test


def emoc():
    classes = ["others", "happy", "sad", "angry"]

    def rows(name):
        lines = (DATA / "emoc" / name).read_text(encoding="utf-8").split("\n")
        columns = [line.rstrip("\r").split("\t") for line in lines if line]
        return [(" ".join(turn.strip() for turn in x[1:4]).lower(), classes.index(x[4])) for x in columns]

    return (
        "Dialogue: ",
        "\nEmotion:",
        ["Others", "Happy", "Sad", "Angry"],
        rows("train.txt"),
        rows("test.txt"),
    )


def main():
    folder = DATA / "gpt2_bpe"
    tokenizer = GPT2Tokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    found = {}
    for make in (sst2, trec, agnews, emoc):
        before, between, words, train, test = make()
        shown = [next(text for text, label in train if label == number) for number in range(len(words))]
        text, places = "", []
        for demonstration, word in zip(shown, words, strict=True):
            text += before + demonstration + between
            places.append(len(tokenizer(text)["input_ids"]))
            text += f" {word}\n"
        ids = tokenizer(text + before + test[0][0] + between)["input_ids"]
        digest = hashlib.sha256(json.dumps([int(token) for token in ids]).encode()).hexdigest()
        found[make.__name__] = {"tokens": len(ids), "sha256": digest, "label_words": places}
    out = Path(__file__).with_name("digests.json")
    out.write_text(json.dumps(found, indent=1) + "\n")


main()
