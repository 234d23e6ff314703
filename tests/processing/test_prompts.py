"""The text around images, and folders, prompts and tokenizers that are refused."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from jaxlab.checkpoints import families
from jaxlab.errors import UserError
from jaxlab.processing import pixels, tiles
from tests.processing.folders import CASES, GOLDEN, load_processor, write_folder

TOKENIZER = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
WIDE, GRAY = GOLDEN / "wide.png", GOLDEN / "gray.png"
LEADS = {
    "llava": "<image>\n<image>\n",
    "llava_next": "<image>\n<image>\n",
    "llava_onevision": "<image>\n<image>\n",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>" * 2,
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>" * 2,
    "internvl": "<IMG_CONTEXT>\n<IMG_CONTEXT>\n",
    "paligemma": "<image><image>",
    "gemma3": "<start_of_image><start_of_image>",
    "idefics3": "<image><image>",
    "idefics2": "<image><image>",
    "mistral3": "[IMG][IMG]",
    "mllama": "<|image|><|image|>",
}


@pytest.mark.parametrize("name", LEADS)
def test_images_go_before_a_prompt_without_placeholders(name, tmp_path):
    processor = load_processor(write_folder(tmp_path, name))
    found = processor("What?", [WIDE, GRAY], TOKENIZER)
    expected = processor(LEADS[name] + "What?", [WIDE, GRAY], TOKENIZER)
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    np.testing.assert_array_equal(found["images"], expected["images"])


def test_a_prompt_without_images_is_its_text(tmp_path):
    batch = load_processor(write_folder(tmp_path, "llava"))("ab", [], TOKENIZER)
    assert batch.keys() == {"tokens"}
    assert batch["tokens"].tolist() == [TOKENIZER.encode("ab").ids]


@pytest.mark.parametrize(
    ("name", "prompt", "images", "count"),
    [
        ("llava", "<image> and <image>", [WIDE], "2 <image> for 1 images"),
        ("qwen2_vl", "a <|image_pad|>", [WIDE, GRAY], r"1 <\|image_pad\|> for 2 images"),
        ("gemma3", "<start_of_image>", [], "1 <start_of_image> for 0 images"),
    ],
)
def test_placeholders_and_images_are_as_many(name, prompt, images, count, tmp_path):
    with pytest.raises(UserError, match=count):
        load_processor(write_folder(tmp_path, name))(prompt, images, TOKENIZER)


def test_the_class_token_and_patch_size_follow_the_model_where_no_file_says(tmp_path):
    tower = {"model_type": "clip_vision_model", "patch_size": 6}
    folder = write_folder(tmp_path, "llava", config={"vision_config": tower})
    (folder / "processor_config.json").unlink()
    batch = load_processor(folder)("", [WIDE], TOKENIZER)
    assert (batch["tokens"] == CASES["llava"]["config"]["image_token_index"]).sum() == 9
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UserError, match="no patch_size"):
        load_processor(folder)


def test_settings_given_here_are_stronger_than_the_files(tmp_path):
    folder = write_folder(tmp_path, "qwen2_vl")
    few = load_processor(folder, max_pixels=300)("", [WIDE], TOKENIZER)
    assert len(few["images"]) < len(load_processor(folder)("", [WIDE], TOKENIZER)["images"])


def test_a_tokenizer_that_cuts_texts_does_not(tmp_path):
    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    processor = load_processor(write_folder(tmp_path, "llava"))
    whole = processor("ab", [WIDE], tokenizer)["tokens"]
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=100)
    assert processor("ab", [WIDE], tokenizer)["tokens"].tolist() == whole.tolist()


def test_tokenizers_without_the_tokens_of_the_family(tmp_path):
    processor = load_processor(write_folder(tmp_path, "llava", config={"image_token_index": 99999}))
    with pytest.raises(UserError, match="image_token_index is 99999, which the tokenizer does not have"):
        processor("", [WIDE], TOKENIZER)
    processor = load_processor(write_folder(tmp_path, "llava", config={"image_token_index": None}))
    assert processor("", [WIDE], TOKENIZER)["tokens"].size > 16
    without = Tokenizer.from_str(TOKENIZER.to_str().replace('"<image>"', '"<picture>"'))
    with pytest.raises(UserError, match="no token <image>"):
        processor("", [WIDE], without)
    # A word that stands for image tokens, but falls apart in a text.
    processor = load_processor(write_folder(tmp_path, "llava", config={"image_token_index": 256}))
    with pytest.raises(UserError, match="image tokens ĊĊ became 0"):
        processor("", [WIDE], TOKENIZER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processor": {"processor_class": "BlipProcessor"}}, "class 'BlipProcessor' is not supported; supp"),
        ({"preprocessor": {"image_processor_type": "ViTImageProcessor"}}, "supported are CLIPImageProcessor"),
        ({"preprocessor": {"size": {"longest_edge": 5}}}, "size needs shortest_edge"),
        ({"preprocessor": {"size": "large"}}, "size must be a size, is 'large'"),
        ({"preprocessor": {"size": {"shortest_edge": 0}}}, "size.shortest_edge must be a whole number"),
        ({"preprocessor": {"crop_size": {"height": 3}}}, "crop_size needs height and width"),
        ({"preprocessor": {"resample": 17}}, "resample must be a whole number from 0 to"),
        ({"preprocessor": {"do_resize": "yes"}}, "do_resize must be true or false, is 'yes'"),
        ({"preprocessor": {"image_mean": [1, 2]}}, "image_mean must be three numbers"),
        ({"preprocessor": {"image_std": [1, 0, 1]}}, "image_std must not hold 0"),
        ({"preprocessor": {"rescale_factor": float("inf")}}, "rescale_factor must be a number"),
        ({"processor": {"patch_size": "14"}}, "patch_size must be a whole number"),
        ({"processor": {"vision_feature_select_strategy": 1}}, "must be a word"),
    ],
)
def test_folders_with_wrong_values(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        load_processor(write_folder(tmp_path, "llava", **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava_next", {"image_grid_pinpoints": [[12, 13]]}, "12 by 13 is not made of tiles of 12"),
        ("llava_next", {"image_grid_pinpoints": [[12]]}, r"must hold pairs \[height, width\]"),
        ("llava_next", {"image_grid_pinpoints": 3}, r"must be a list of \[height, width\]"),
        ("qwen2_vl", {"min_pixels": 5000}, "needs shortest_edge and longest_edge"),
        ("idefics3", {"max_image_size": {"height": 3, "width": 3}}, "max_image_size needs longest_edge"),
        ("idefics3", {"size": {"shortest_edge": 3}}, "size needs longest_edge"),
        ("internvl", {"max_patches": 100000}, "max_patches must be a whole number from 1 to 256"),
        ("paligemma", {"image_seq_length": None}, "no image_seq_length"),
        ("idefics2", {"size": {"longest_edge": 9}}, "size needs shortest_edge and longest_edge, or height"),
        ("idefics2", {"do_pad": False}, "do_pad must be true"),
        ("mistral3", {"size": {"shortest_edge": 9}}, "size needs longest_edge, or height and width"),
        ("mistral3", {"do_center_crop": True}, "do_center_crop is not supported by this processor"),
        ("mllama", {"size": {"height": 9, "width": 8}}, "size must be a square, is 9 by 8"),
        ("mllama", {"do_resize": False}, "do_resize must be true"),
        ("mllama", {"max_image_tiles": 0}, "max_image_tiles must be a whole number from 1 to 64"),
        ("mllama", {"size": 1 << 14}, "images would be filled up to"),
    ],
)
def test_folders_of_other_families_with_wrong_values(name, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_processor(write_folder(tmp_path, name, preprocessor=changes))


def test_one_vision_is_told_how_many_tiles_count(tmp_path):
    changed = {"vision_aspect_ratio": "square"}
    with pytest.raises(UserError, match="must be like anyres_max_9, is 'square'"):
        load_processor(write_folder(tmp_path, "llava_onevision", processor=changed))


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(UserError, match="it reads no images"):
        load_processor(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    for text, message in (
        ("[1]", "must be a JSON object"),
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        (" " * (5 << 20), "too many for a config"),
        ("\xff", "not JSON"),
    ):
        file.write_bytes(text.encode("latin1"))
        with pytest.raises(UserError, match=message):
            load_processor(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": 3}')
    with pytest.raises(UserError, match="must be an object"):
        load_processor(tmp_path)


def test_the_class_of_processor_is_stronger_than_the_type_of_the_model(tmp_path):
    """As for transformers; of files the processor's comes first, and the tokenizer's last."""
    folder = write_folder(tmp_path, "qwen3_vl")
    own = load_processor(folder)("", [WIDE], TOKENIZER)
    config = {**CASES["qwen3_vl"]["config"], "model_type": "llava"}
    (folder / "config.json").write_text(json.dumps(config))
    named = load_processor(folder)("", [WIDE], TOKENIZER)
    assert named["tokens"].tolist() == own["tokens"].tolist()
    around = json.loads((folder / "processor_config.json").read_text())
    del around["processor_class"]
    (folder / "processor_config.json").write_text(json.dumps(around))
    (folder / "tokenizer_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    assert load_processor(folder)("", [WIDE], TOKENIZER)["tokens"].tolist() == own["tokens"].tolist()
    (folder / "tokenizer_config.json").write_text('{"processor_class": "PixelProcessor"}')
    with pytest.raises(UserError, match=r"tokenizer_config.json: processor_class 'PixelProcessor' is not"):
        load_processor(folder)


def test_a_family_without_a_processor_reads_no_images():
    with pytest.raises(UserError, match=r"llama has no processor of images; those with one: .*qwen"):
        families.processor_kinds("llama")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("qwen2_vl", "<|video_pad|>"),
        ("internvl", "<video>"),
        ("smolvlm", "<video>"),
        ("llava_onevision", "<video>"),
    ],
)
def test_videos_are_refused_and_their_files_do_not_matter(name, word, tmp_path):
    folder = write_folder(tmp_path, name, processor={"video_processor": {"video_processor_type": "A"}})
    (folder / "video_preprocessor_config.json").write_text('{"processor_class": "B", "size": 3}')
    processor = load_processor(folder)
    assert processor("", [WIDE], TOKENIZER)["tokens"].size
    with pytest.raises(UserError, match=f"^the prompt holds {re.escape(word)}: videos are not read; give fr"):
        processor(f"What is {word}?", [], TOKENIZER)
    (tmp_path / "clip.MP4").write_bytes(b"")
    with pytest.raises(UserError, match=r"clip\.MP4: videos are not read; give frames of it as images"):
        processor("", [tmp_path / "clip.MP4"], TOKENIZER)


def test_the_token_of_a_video_is_that_of_the_config(tmp_path):
    number = TOKENIZER.token_to_id("<end_of_utterance>")
    processor = load_processor(write_folder(tmp_path, "qwen2_vl", config={"video_token_id": number}))
    with pytest.raises(UserError, match="the prompt holds <end_of_utterance>: videos are not read"):
        processor("<end_of_utterance>", [], TOKENIZER)


def test_idefics2_keeps_its_size_and_images_are_filled_up_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "MOST_PIXELS", 2000)
    folder = write_folder(
        tmp_path, "idefics2", preprocessor={"size": {"shortest_edge": 1, "longest_edge": 400}}
    )
    wide, high = (tmp_path / name for name in ("wide.png", "high.png"))
    Image.new("RGB", (300, 2)).save(wide)
    Image.new("RGB", (2, 300)).save(high)
    processor = load_processor(folder)
    assert processor("", [wide], TOKENIZER)["images"].shape == (1, 1, 3, 2, 300)
    with pytest.raises(UserError, match="images would be filled up to 300 by 300 pixels"):
        processor("", [wide, high], TOKENIZER)


def test_words_of_pixtral_that_the_folder_changes_are_refused(tmp_path):
    folder = write_folder(tmp_path, "mistral3", processor={"image_break_token": "[BREAK]"})
    with pytest.raises(UserError, match=r"image_break_token must be \[IMG_BREAK\]"):
        load_processor(folder)


def test_internvl_in_its_authors_layout_makes_the_same_batch(tmp_path):
    """Of settings in config.json alone; the marks in a prompt are words and no tokens."""
    vision = {"patch_size": 4, "image_size": 16}
    told = {"force_image_size": 16, "dynamic_image_size": True, "use_thumbnail": True}
    told |= {"model_type": "internvl_chat", "max_dynamic_patch": 12, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(told))
    processor = load_processor(tmp_path)
    images = [GOLDEN / image for image in CASES["internvl_imagenet"]["images"]]
    plain = Tokenizer.from_file(str(GOLDEN / "tokenizer_plain.json"))
    batch = processor("<image>\nWhat? <image>\n", images, plain)
    with np.load(GOLDEN / "batches.npz") as file:
        expected = {key: file[f"internvl_imagenet.{key}"] for key in ("tokens", "images")}
    assert batch["tokens"].tolist() == expected["tokens"].tolist()
    np.testing.assert_allclose(batch["images"], expected["images"], rtol=0, atol=1e-6)
    unmarked = processor("What?", images, plain)["tokens"]
    assert unmarked.tolist() == processor("<image>\n<image>\nWhat?", images, plain)["tokens"].tolist()
    with pytest.raises(UserError, match="the prompt holds 1 <image> for 2 images"):
        processor("<image>", images, plain)
    (tmp_path / "config.json").write_text(json.dumps({**told, "dynamic_image_size": False}))
    assert load_processor(tmp_path)("", images, plain)["images"].shape == (2, 3, 16, 16)
    (tmp_path / "config.json").write_text(json.dumps({**told, "pad2square": True}))
    with pytest.raises(UserError, match="pad2square true is not supported"):
        load_processor(tmp_path)


def test_grids_of_equally_many_tiles_are_tried_in_the_order_of_the_authors():
    """Their code sorts a set; where an image is as near to two grids, the later one is taken."""
    theirs, ours = tiles.original_grids(1, 12), tiles.grids(1, 12)
    assert set(theirs) == set(ours)
    assert [a * b for a, b in theirs] == [a * b for a, b in ours]
    assert theirs != ours
