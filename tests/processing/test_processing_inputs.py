"""What a call gets: texts without placeholders, pictures of every row, pictures of every kind, contents of messages."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import TemplateError
from PIL import Image
from tiny import bert_like_tokenizer, tiny_image, tiny_model, tiny_stage1, tiny_tokenizer
from transformers import AutoProcessor, GenerationConfig, pipeline

import vlbridge
from vlbridge.convert import convert_blip2, convert_llava, export


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
CASES = Path(__file__).parents[1] / "parity" / "cases"
QUESTION = "Question: what is it? Answer:"
# what the official code makes of a question and of nothing
PROMPTS = {
    "mlp": ("USER: <image>\n{} ASSISTANT:", "USER: <image>\nDescribe the image briefly. ASSISTANT:"),
    "qformer": ("<image>{}", "<image>a photo of"),
    "perceiver": ("<image>{}", "<image>Output:"),
}


def same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ---------------------------------------------------------------------- texts without placeholders


# The documents' sketch, with our names for the two classes and the folder.
def blip2_caption(image_path, model_class, processor_class, folder, prompt=""):
    """Generate caption or answer question with BLIP-2."""
    processor = processor_class.from_pretrained(folder)
    model = model_class.from_pretrained(
        folder,
        torch_dtype=torch.float16,
    )
    model.eval()

    image = Image.open(image_path).convert("RGB")

    if prompt:
        inputs = processor(images=image, text=prompt, return_tensors="pt").to(dtype=torch.float16)
    else:
        inputs = processor(images=image, return_tensors="pt").to(dtype=torch.float16)

    with torch.no_grad():
        generated_ids = model.generate(**inputs, max_new_tokens=50)

    text = processor.batch_decode(generated_ids, skip_special_tokens=True)[0].strip()
    return text


@pytest.mark.core
@families
def test_the_sketch_of_the_documents_runs(bridge, tmp_path):
    model, processor = tiny_model(bridge)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    tiny_image().save(tmp_path / "picture.png")
    classes = vlbridge.FAMILIES[bridge].model_class, vlbridge.FAMILIES[bridge].processor_class
    half = classes[0].from_pretrained(tmp_path / "model", dtype=torch.float16).eval()
    for prompt, written in zip((QUESTION, ""), PROMPTS[bridge]):
        found = blip2_caption(tmp_path / "picture.png", *classes, tmp_path / "model", prompt)
        inputs = processor(images=[tiny_image()], text=[written.format(prompt)], return_tensors="pt")
        ids = half.generate(**inputs.to(dtype=torch.float16), max_new_tokens=50)
        assert found == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


@pytest.mark.core
@families
def test_images_are_put_where_the_official_code_has_them(bridge):
    _, processor = tiny_model(bridge)
    call = functools.partial(processor, return_tensors="pt", padding=True)
    asked, caption = PROMPTS[bridge]
    first, second = tiny_image(0), tiny_image(1)
    texts = ["what is it?", "and the colour of that?"]
    written = [asked.format(text) for text in texts]
    for image in (first, [first], [[first]], np.array(first)):
        same(call(images=image, text=texts[0]), call(images=[first], text=[written[0]]))
        same(call(images=image), call(images=[first], text=[caption]))
    expected = call(images=[first, second], text=written)
    for images in ([first, second], [[first], [second]], (first, second), np.stack([first, second])):
        same(call(images=images, text=texts), expected)
        same(processor(images=images, return_tensors="pt"), call(images=[first, second], text=[caption] * 2))
    for row, (image, text) in enumerate(zip((first, second), texts)):  # batch equals single
        alone = call(images=image, text=text)["input_ids"][0]
        assert torch.equal(expected["input_ids"][row][-len(alone) :], alone)
    images_of = {"mlp": "<image>\n<image>\n"}.get(bridge, "<image><image>")
    both = asked.replace("<image>\n", "<image>").replace("<image>", images_of).format(texts[0])
    same(call(images=[first, second], text=texts[0]), call(images=[first, second], text=[both]))
    same(
        call(images=[[first, second], []], text=["what is it?", "only text"]),
        call(images=[first, second], text=[both, "only text"]),
    )
    same(call(images=[[first], [second]], text=[written[0], texts[1]]), expected)


@pytest.mark.core
@families
def test_which_images_belong_where_is_not_guessed(bridge):
    _, processor = tiny_model(bridge)
    image = tiny_image()
    for images, text, message in (
        ([image, image], "<image> what", "number of <image> tokens in the text is 1, but 2 images"),
        ([image] * 3, ["a", "b"], "3 images for 2 texts without <image>"),
        (image, ["a", "b"], "1 images for 2 texts without <image>"),
        ([[image, image]], "<image>a", "tokens in text 0 is 1, but 2 images"),
        ([[image], image], ["a", "b"], "pictures and lists of pictures"),
        ([[image], []], None, "Row 1 of images is empty"),
        ([], None, "Row 0 of images is empty"),
        ([None], "a", "NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=text, return_tensors="pt")
    if bridge != "perceiver":
        with pytest.raises(ValueError, match="takes no videos"):
            processor(images=[[[image, image]]], text=["a"])


def test_videos_are_put_before_texts_too():
    _, processor = tiny_model("perceiver")
    images = [[[tiny_image(0), tiny_image(1)], tiny_image(2)], [tiny_image(3)]]
    call = functools.partial(processor, images=images, padding=True)
    same(call(text=["one", "two"]), call(text=["<image><image>one", "<image>two"]))
    same(call(), call(text=["<image><image>Output:", "<image>Output:"]))


def test_the_beginning_of_sequence_is_written_once():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}[{{ message.content }}]{% endfor %}"
    _, processor = tiny_model("mlp")
    processor.tokenizer.chat_template = tokenizer.chat_template
    processor.chat_template = processor.build_chat_template(processor.tokenizer)
    turn = [{"role": "user", "content": [{"type": "image", "image": tiny_image()}, {"type": "text", "text": "what"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    found = processor(images=tiny_image(), text="what", return_tensors="pt")
    same(found, processor.apply_chat_template(turn, **options))
    assert int((found["input_ids"] == processor.tokenizer.bos_token_id).sum()) == 1
    with pytest.raises(ValueError, match="begins texts with '<s>'"):
        processor(images=[[tiny_image()], []], text=["what", "that"], return_tensors="pt", padding=True)


def test_a_conversation_that_drops_the_text_is_refused():
    _, processor = tiny_model("mlp", conversation="plain")
    assert processor.text_with_images(processor.caption_prompt, 1) == "<image>"
    with pytest.raises(ValueError, match="something is left out"):
        processor(images=tiny_image(), text="what is it?", return_tensors="pt")


@pytest.mark.parametrize("instruction", [None, "look at that"])
def test_the_qformer_reads_the_question(instruction):
    _, processor = tiny_model("qformer")
    processor.qformer_tokenizer = bert_like_tokenizer()
    options = {"return_tensors": "pt", **({} if instruction is None else {"qformer_text": instruction})}
    same(
        processor(images=tiny_image(), text="w1 w2", **options),
        processor(images=tiny_image(), text="<image>w1 w2", **options),
    )
    same(processor(images=tiny_image(), **options), processor(images=tiny_image(), text="<image>a photo of", **options))


@pytest.mark.core
def test_ids_are_those_of_the_native_blip2_processor(tmp_path):
    case = CASES / "blip2" / "caption_coco_opt_vitunfrozen"
    sizes = json.loads((case / "meta.json").read_text())["config"]
    heads = {
        "vision_config": {"num_attention_heads": sizes["vit_heads"]},
        "qformer_config": {"num_attention_heads": sizes["q_heads"]},
    }
    convert_blip2(
        case / "checkpoint.pth", case / "vit.pth", case / "llm" if (case / "llm").is_dir() else None,
        output=tmp_path / "ours", qformer_tokenizer=case / "bert-base-uncased", config=heads,
    )  # fmt: skip
    export(tmp_path / "ours", tmp_path / "native")
    ours, native = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("ours", "native"))
    images = [tiny_image(0), tiny_image(1)]
    for given in (
        {"images": images[0], "text": QUESTION},
        {"images": images, "text": [QUESTION, "a photo of"]},
    ):
        found, expected = (each(**given, return_tensors="pt", padding=True) for each in (ours, native))
        for row, mask in zip(
            zip(found["input_ids"], expected["input_ids"]), zip(found["attention_mask"], expected["attention_mask"])
        ):
            assert row[0][mask[0].bool()].tolist() == row[1][mask[1].bool()].tolist()
    caption = ours(images=images[0], return_tensors="pt")["input_ids"]
    assert torch.equal(caption, native(images=images[0], text="a photo of", return_tensors="pt")["input_ids"])


@pytest.mark.core
def test_ids_are_those_of_the_native_llava_processor(tmp_path):
    case = CASES / "llava" / "v16_anyres"
    convert_llava(case / "checkpoint", case / "clip_vision_tower", output=tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "native")
    ours, native = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("ours", "native"))
    turn = [{"role": "user", "content": [{"type": "image", "image": tiny_image()}, {"type": "text", "text": QUESTION}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    expected = native.apply_chat_template(turn, **options)["input_ids"]
    assert torch.equal(ours(images=tiny_image(), text=QUESTION, return_tensors="pt")["input_ids"], expected)


@pytest.mark.core
@families
def test_the_pipeline_needs_no_placeholder(bridge, tmp_path):
    model, processor = tiny_model(bridge)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    options = {"max_new_tokens": 5, "return_full_text": False}
    said = [pipe(images=tiny_image(row), text=QUESTION, **options)[0]["generated_text"] for row in (0, 1)]
    together = pipe(images=[tiny_image(0), tiny_image(1)], text=[QUESTION, QUESTION], **options)
    assert [row["generated_text"] for row in together] == said
    for row in (0, 1):
        text = PROMPTS[bridge][0].format(QUESTION)
        inputs = processor(images=[tiny_image(row)], text=[text], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert said[row] == processor.decode(ids, skip_special_tokens=True)


# ---------------------------------------------------------------------- images of the wrong rows


@pytest.mark.core
@families
def test_every_row_has_its_own_images(bridge):
    _, processor = tiny_model(bridge)
    image = tiny_image()
    for images, texts, message in (
        ([[], [image]], ["<image>a", "b"], "tokens in text 0 is 1, but 0 images"),
        ([[image], []], ["a", "<image>b"], "tokens in text 1 is 1, but 0 images"),
        ([[image, image], [image]], ["<image>a", "<image><image>b"], "tokens in text 0 is 1, but 2 images"),
        ([[image, image]], ["<image>a", "<image>b"], "holds 1 lists, but there are 2 texts"),
        ([[image], [image]], ["<image><image>a"], "holds 2 lists, but there are 1 texts"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(images=images, text=texts, return_tensors="pt", padding=True)
    with_image = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "a"}]}]
    without = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]
    twice = [
        {"role": "user", "content": [{"type": "image", "image": image, "path": image}, *with_image[0]["content"][1:]]}
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="tokens in text 0 is 1, but 0 images"):
        processor.apply_chat_template([without, twice], **options)
    processor.chat_template = "{% for message in messages %}{{ message.content[-1].text }}{% endfor %}"
    with pytest.raises(ValueError, match="tokens in text 0 is 0, but 1 images"):  # no second guess after a template
        processor.apply_chat_template(with_image, **options)
    wrong = processor(images=[[image], []], text=["<image>a", "b"], return_tensors="pt", padding=True)
    assert len(wrong["pixel_values"]) == 1


# ---------------------------------------------------------------------- contents of messages


@pytest.mark.core
@families
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "input_image", "image": 1}], "Message 1 has content of type 'input_image'"),
        ([{"type": "text", "text": "a"}, {"type": "video", "video": 1}], "of type 'video'; expected 'text' or 'image'"),
        ([{"type": "imgae"}], "of type 'imgae'"),
        ([{"text": "a"}], "without a type"),
        (["a"], "without a type"),
        ([{"type": "text", "content": "a"}], "'text' without 'text'"),
        ({"type": "text", "text": "a"}, "content of message 1 is a dict"),
    ],
)
def test_unknown_contents_are_refused_by_name(bridge, content, message):
    _, processor = tiny_model(bridge)
    conversation = [{"role": "user", "content": "hello"}, {"role": "user", "content": content}]
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation, tokenize=tokenize)
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([conversation, conversation])


@families
def test_the_template_itself_refuses_unknown_contents(bridge):
    """Servers render it without the processor."""
    _, processor = tiny_model(bridge)
    processor.tokenizer.chat_template = processor.chat_template
    with pytest.raises(TemplateError, match="type 'input_image'"):
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "input_image"}]}], tokenize=False
        )


@families
def test_openai_images_are_known(bridge, tmp_path):
    _, processor = tiny_model(bridge)
    tiny_image().save(tmp_path / "a.png")
    data = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    contents = [
        {"type": "image", "image": tiny_image()},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image_url", "image_url": {"url": data}},
    ]
    found = [processor.apply_chat_template([{"role": "user", "content": [each]}], **options) for each in contents]
    same(found[1], found[0])
    same(found[2], found[0])


# ---------------------------------------------------------------------- one road for pixels

RAMP = np.linspace(0, 1, 40 * 33).reshape(33, 40)


def kinds() -> dict[str, tuple]:
    """Pictures of every kind, and what they show as 8-bit RGB."""
    gray = np.rint(RAMP * 255).astype(np.uint8)
    deep = np.rint(RAMP * 65535)
    ramp = Image.fromarray(gray).convert("RGB")
    rgb = np.asarray(tiny_image())
    rgba = np.dstack([rgb, gray])
    on_white = np.rint(rgb * (gray / 255.0)[..., None] + 255.0 - gray[..., None]).astype(np.uint8)
    on_white = Image.fromarray(on_white)
    return {
        "I;16": (Image.fromarray(deep.astype(np.uint16)), ramp),
        "I": (Image.fromarray(deep.astype(np.int32)), ramp),
        "F": (Image.fromarray(RAMP.astype(np.float32)), ramp),
        "F up to 255": (Image.fromarray((RAMP * 255).astype(np.float32)), ramp),
        "L": (Image.fromarray(gray), ramp),
        "RGBA": (Image.fromarray(rgba), on_white),
        "LA": (Image.merge("LA", [Image.new("L", (40, 33)), Image.fromarray(255 - gray)]), ramp),
        "uint16": (deep.astype(np.uint16), ramp),
        "int32": (deep.astype(np.int32), ramp),
        "float32": (np.dstack([RAMP.astype(np.float32)] * 3), ramp),
        "gray": (gray, ramp),
        "gray tensor": (torch.from_numpy(gray)[None], ramp),
        "RGBA array": (rgba, on_white),
        "RGBA tensor": (torch.from_numpy(rgba).permute(2, 0, 1), on_white),
        "uint8 tensor": (torch.from_numpy(rgb.copy()).permute(2, 0, 1), tiny_image()),
        "float tensor": (torch.from_numpy(rgb.copy()).permute(2, 0, 1) / 255.0, tiny_image()),
        "bfloat16 tensor": (torch.from_numpy(RAMP)[None].bfloat16().expand(3, -1, -1), ramp),
        "16-bit colours": (rgb.astype(np.uint16) * 257, tiny_image()),
    }


PROCESSORS = {
    "mlp": {},
    "mlp, padded": {"image_aspect_ratio": "pad"},
    "mlp, anyres": {"image_aspect_ratio": "anyres"},
    "qformer": {},
    "perceiver": {},
    "stage 1": {},
}


@functools.cache
def processor_of(name: str):
    return (tiny_stage1() if name == "stage 1" else tiny_model(name.split(",")[0], **PROCESSORS[name]))[1]


@pytest.mark.core
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_picture_is_seen_as_it_is(name, kind):
    processor = processor_of(name)
    image, shown = kinds()[kind]
    level = 1.01 / 255 / min(processor.image_processor.image_std)  # one grey level
    tolerance = 3 * level if kind.startswith("bfloat16") else level  # it holds 8 bits
    expected = processor(images=[shown], return_tensors="pt")["pixel_values"]
    for images in (image, [image]):
        found = processor(images=images, return_tensors="pt")["pixel_values"]
        assert (found - expected).abs().max() <= tolerance
    if name == "perceiver":
        video = processor(images=[[[image, image]]], text="<image>")["pixel_values"]
        assert (video - expected).abs().max() <= tolerance


@pytest.mark.core
@pytest.mark.parametrize("name", PROCESSORS)
def test_files_and_addresses_are_read_the_same_way(name, tmp_path, monkeypatch):
    processor = processor_of(name)
    for kind, file in (("I;16", "deep.png"), ("RGBA", "clear.png")):
        kinds()[kind][0].save(tmp_path / file)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for kind, file in (("I;16", "deep.png"), ("RGBA", "clear.png")):
            expected = processor(images=kinds()[kind][1], return_tensors="pt")["pixel_values"]
            level = 1.01 / 255 / min(processor.image_processor.image_std)
            data = base64.b64encode((tmp_path / file).read_bytes()).decode()
            place = f"http://127.0.0.1:{server.server_port}/{file}"
            for given in (str(tmp_path / file), tmp_path / file, data, f"data:image/png;base64,{data}", place):
                found = processor(images=given, return_tensors="pt")["pixel_values"]
                assert (found - expected).abs().max() <= level
        with pytest.raises(ValueError, match="cannot be fetched"):
            processor(images=f"http://127.0.0.1:{server.server_port}/no.png")
        monkeypatch.setattr("vlbridge.images.MAX_DOWNLOAD", 10)
        with pytest.raises(ValueError, match="download it first"):
            processor(images=place)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ValueError, match="no such file"):
        processor(images="no.png")


@pytest.mark.parametrize("name", ["mlp", "qformer", "perceiver", "stage 1"])
def test_pictures_that_are_rescaled_already_stay_as_they_are(name):
    processor = processor_of(name)
    shown = np.array(tiny_image())
    options = {"do_rescale": False, "return_tensors": "pt"}
    floats = (shown / 255.0).astype(np.float32)
    for image in (floats, torch.from_numpy(floats).permute(2, 0, 1)):
        expected = processor.image_processor(image, **options)["pixel_values"]
        assert torch.equal(processor(images=image, **options)["pixel_values"], expected)
    clear = np.dstack([floats, np.ones_like(floats[..., :1])])
    expected = processor.image_processor(floats, **options)["pixel_values"]
    torch.testing.assert_close(processor(images=clear, **options)["pixel_values"], expected, atol=0.02, rtol=0)
    first = processor(images=shown.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt")
    assert torch.equal(first["pixel_values"], processor(images=shown, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("name", PROCESSORS)
def test_arrays_that_are_no_pictures_are_refused(name):
    processor = processor_of(name)
    with pytest.raises(ValueError, match="values down to -1"):
        processor(images=torch.linspace(-1, 1, 3 * 30 * 30).reshape(3, 30, 30))
    with pytest.raises(ValueError, match="shape .7, 8, 9. is no picture"):
        processor(images=np.zeros((7, 8, 9), np.uint8))
    with pytest.raises(ValueError, match="A picture is a BytesIO"):
        processor(images=io.BytesIO())
