import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, ViTImageProcessor

from nanovlm_hf import NanoVLMImageProcessor

from helpers.models import random_image


@pytest.fixture
def image_processor():
    return NanoVLMImageProcessor()


def pixels_of(image_processor, image, **kwargs) -> np.ndarray:
    return image_processor(image, return_tensors="np", **kwargs)["pixel_values"][0]


def raw(image_processor, image, **kwargs) -> np.ndarray:
    """Return the pixels as 8-bit values, channels last."""
    return pixels_of(
        image_processor, image, do_rescale=False, do_normalize=False, data_format="channels_last", **kwargs
    )


GREY_LEVEL = 1.001 / 255 / 0.224  # of the channel with the smallest standard deviation


def plain(colour, size=(60, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_values_are_normalised_with_the_imagenet_mean(image_processor):
    pixels = pixels_of(image_processor, plain((255, 0, 128)))
    want = (np.array([1.0, 0.0, 128 / 255]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, np.broadcast_to(want[:, None, None], pixels.shape), atol=1e-5)


def test_resizing_ignores_the_aspect_ratio_unless_cropped(image_processor):
    wide = plain("red", (90, 30))
    wide.paste("blue", (30, 0, 60, 30))
    squashed = raw(image_processor, wide)
    assert (squashed[:, :60, 0] > 200).all()
    assert (squashed[:, 90:130, 2] > 200).all()
    cropped = raw(image_processor, wide, do_center_crop=True)
    assert (cropped[..., 2] == 255).all()


def test_exif_rotation_is_applied(image_processor):
    image = plain("red", (40, 80))
    image.paste("blue", (0, 40, 40, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.info["exif"] = exif.tobytes()
    upright = raw(image_processor, image)
    assert (upright[:, :90, 2] > 200).all()
    assert (upright[:, 130:, 0] > 200).all()


def test_transparency_is_composited_on_white(image_processor):
    clear = Image.new("RGBA", (30, 30), (255, 0, 0, 0))
    assert (raw(image_processor, clear) == 255).all()
    palette = Image.new("P", (30, 30), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.info["transparency"] = 0
    assert (raw(image_processor, palette) == 255).all()


@pytest.mark.parametrize(
    ("image", "want"),
    [
        (Image.new("L", (30, 30), 100), (100, 100, 100)),
        (Image.new("1", (30, 30), 1), (255, 255, 255)),
        (Image.new("CMYK", (30, 30), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.fromarray(np.full((30, 30), 0x8080, np.uint16)), (128, 128, 128)),
        (Image.new("F", (30, 30), 100.0), (100, 100, 100)),
        (Image.new("LA", (30, 30), (100, 255)), (100, 100, 100)),
        (Image.new("RGB", (30, 30), (1, 2, 3)).quantize(), (1, 2, 3)),
    ],
    ids=["grey", "bilevel", "CMYK", "16-bit", "float", "grey with alpha", "palette"],
)
def test_every_mode_is_converted_to_rgb(image_processor, image, want):
    pixels = raw(image_processor, image)
    assert pixels.shape == (224, 224, 3)
    assert (np.abs(pixels.astype(int) - want) <= 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3), (224, 224)])
def test_every_size(image_processor, size):
    assert pixels_of(image_processor, random_image(size=size)).shape == (3, 224, 224)


def test_arrays_and_tensors_equal_the_pillow_image(image_processor):
    image = random_image()
    want = pixels_of(image_processor, image)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    for same in (array, array.transpose(2, 0, 1), array.astype(np.int64), array.astype(np.uint16)):
        np.testing.assert_allclose(pixels_of(image_processor, same), want, atol=1e-5)
    for same in (tensor, tensor.permute(2, 0, 1), tensor.int()):
        np.testing.assert_allclose(pixels_of(image_processor, same), want, atol=GREY_LEVEL)
    # Floats are not rounded to 8 bits.
    for same in (array.astype(np.float32), array.astype(np.float64), tensor.float(), tensor.permute(2, 0, 1).float()):
        np.testing.assert_allclose(pixels_of(image_processor, same), want, atol=0.02)
    for same in (array / 255, array.transpose(2, 0, 1) / 255, tensor.float() / 255):
        np.testing.assert_allclose(pixels_of(image_processor, same, do_rescale=False), want, atol=0.02)
    np.testing.assert_allclose(
        pixels_of(image_processor, (tensor.float() / 255).bfloat16(), do_rescale=False), want, atol=0.05
    )


ARRAYS = {
    "uint8": lambda array: array,
    "int64": lambda array: array.astype(np.int64),
    "uint16": lambda array: array.astype(np.uint16),
    "bool": lambda array: array > 127,
    "float32 of 0..255": lambda array: array.astype(np.float32),
    "float64 of 0..1": lambda array: array / 255,
    "nearly black float32": lambda array: (array / 400).astype(np.float32),
    "channels first": lambda array: array.transpose(2, 0, 1),
    "tensor": lambda array: torch.from_numpy(array.copy()),
    "float tensor of 0..1": lambda array: torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255,
}


@pytest.mark.parametrize("steps", [{}, {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}], ids=str)
@pytest.mark.parametrize("size", [(300, 260), (224, 224), (48, 64)], ids=str)
@pytest.mark.parametrize("kind", ARRAYS)
def test_values_agree_with_image_processors_of_transformers(image_processor, kind, size, steps):
    array = ARRAYS[kind](np.asarray(random_image(size=size)))
    common = {"size": {"height": 224, "width": 224}, "resample": 3}
    common |= {"image_mean": image_processor.image_mean, "image_std": image_processor.image_std}
    got = pixels_of(image_processor, array, **steps)
    for other in (CLIPImageProcessor(do_center_crop=False, **common), ViTImageProcessor(**common)):
        want = pixels_of(other, array, **steps)
        # They round or truncate floats to 8 bits before resizing.
        level = 3 / 255 if "float" in kind and "255" not in kind else 1.1
        if steps != {"do_rescale": False, "do_normalize": False}:
            level = 2 * level / 0.224 if steps else 2 / 255 / 0.224
        np.testing.assert_allclose(got, want, atol=level if "float" in kind or kind == "tensor" else 1e-3)


@pytest.mark.parametrize("resample", [0, 2, 3, 4], ids=["nearest", "bilinear", "bicubic", "box"])
@pytest.mark.parametrize("size", [(300, 260), (100, 30), (1501, 700), (1400, 1999)], ids=str)
def test_a_tensor_equals_the_pillow_image_within_a_grey_level(image_processor, size, resample):
    image = random_image(size=size)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for crop in (False, True):
        settings = {"resample": resample, "do_center_crop": crop}
        want = raw(image_processor, image, **settings).astype(int)
        for same in (tensor, tensor.float()):
            np.testing.assert_allclose(raw(image_processor, same, **settings), want, atol=1 if same is tensor else 1.6)


def test_tensors_of_every_size(image_processor):
    sides = range(1, 1400, 7)
    sizes = {image_processor(torch.zeros(3, 1, side), return_tensors="pt")["pixel_values"].shape for side in sides}
    sizes |= {image_processor(torch.zeros(3, side, 2), return_tensors="pt")["pixel_values"].shape for side in sides}
    assert sizes == {(1, 3, 224, 224)}
    odd = torch.zeros(3, 2166, 612, dtype=torch.uint8)  # whose ratio to 224, as a float, is too small by the last bit
    assert image_processor(odd, return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


def test_a_tensor_is_prepared_on_its_device(image_processor):
    tensors = torch.zeros(2, 3, 260, 300, dtype=torch.uint8)
    assert image_processor(tensors, return_tensors="pt")["pixel_values"].shape == (2, 3, 224, 224)
    settings = {"do_rescale": False, "do_normalize": False}
    assert image_processor(tensors, return_tensors="pt", **settings)["pixel_values"].dtype == torch.uint8
    assert image_processor(tensors.float().requires_grad_(), return_tensors="np")["pixel_values"].shape[0] == 2
    with pytest.raises(ValueError, match="tensor"):  # of different sizes
        image_processor([tensors[0], tensors[0, :, 1:]], return_tensors="pt", do_resize=False)
    if torch.cuda.is_available():
        image = random_image(size=(1501, 700))
        tensor = torch.from_numpy(np.array(image)).cuda()
        pixels = image_processor(tensor, return_tensors="pt")["pixel_values"]
        assert pixels.is_cuda
        np.testing.assert_allclose(pixels[0].cpu(), pixels_of(image_processor, image), atol=GREY_LEVEL)


def test_alpha_of_a_tensor_is_composited_on_white(image_processor):
    image = random_image(size=(90, 70)).convert("RGBA")
    image.putalpha(random_image(1, size=(90, 70)).convert("L"))
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    want = raw(image_processor, image).astype(int)
    np.testing.assert_allclose(raw(image_processor, tensor), want, atol=2)  # composited and resized: two roundings
    assert raw(image_processor, torch.zeros(4, 30, 30, dtype=torch.uint8)).min() == 255


def test_floats_keep_their_precision(image_processor):
    fine = np.linspace(0, 1 / 255, 224 * 224, dtype=np.float32).reshape(224, 224, 1).repeat(3, axis=2)
    pixels = pixels_of(image_processor, fine, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(pixels, fine.transpose(2, 0, 1))
    smaller = pixels_of(image_processor, fine, do_rescale=False, do_normalize=False, size={"height": 50, "width": 50})
    assert len(np.unique(smaller)) > 1000


def test_only_do_rescale_decides_about_values_from_0_to_1(image_processor, caplog):
    dark = np.full((30, 30, 3), 1.0, np.float32)
    with caplog.at_level("WARNING"):
        black = pixels_of(image_processor, dark, do_normalize=False)
    np.testing.assert_allclose(black, 1 / 255, atol=1e-6)
    assert pixels_of(image_processor, dark, do_rescale=False).max() == pytest.approx((1 - 0.406) / 0.225, abs=1e-4)


def test_integers_above_8_bits_need_a_rescale_factor(image_processor):
    deep = np.full((30, 30, 3), 30_000, np.uint16)
    for bad in (deep, deep.astype(np.int32) * -1):
        with pytest.raises(ValueError, match="values from 0 to 255"):
            pixels_of(image_processor, bad)
    for same in (deep, torch.from_numpy(deep), torch.from_numpy(deep.astype(np.uint32))):
        pixels = pixels_of(image_processor, same, rescale_factor=1 / 65535, do_normalize=False)
        np.testing.assert_allclose(pixels, 30_000 / 65535, atol=1e-6)


def test_grey_and_transparent_floats_are_converted_to_rgb(image_processor):
    grey = np.full((30, 20), 0.25, np.float32)
    for same in (grey[:, :, None], grey[None]):
        pixels = pixels_of(image_processor, same, do_rescale=False, do_normalize=False)
        np.testing.assert_allclose(pixels, 0.25, atol=1e-6)
    clear = np.zeros((30, 20, 4), np.float32)
    np.testing.assert_allclose(pixels_of(image_processor, clear, do_rescale=False, do_normalize=False), 1.0, atol=1e-6)
    np.testing.assert_allclose(pixels_of(image_processor, clear, do_normalize=False), 1.0, atol=1e-6)


def test_an_array_of_four_rows_does_not_have_four_channels(image_processor):
    array = np.asarray(random_image(size=(50, 4)))
    want = pixels_of(image_processor, random_image(size=(50, 4)))
    np.testing.assert_allclose(pixels_of(image_processor, array), want, atol=1e-5)


def test_floats_are_cropped_and_resized_like_the_pillow_image(image_processor):
    image = random_image(size=(90, 30))
    array = np.asarray(image).astype(np.float32)
    for steps in (
        {"do_center_crop": True},
        {"do_resize": False},
        {"resample": 0},
        {"size": {"height": 9, "width": 80}},
    ):
        np.testing.assert_allclose(
            pixels_of(image_processor, array, **steps), pixels_of(image_processor, image, **steps), atol=0.02
        )


def test_a_batch_of_images(image_processor):
    batch = image_processor([random_image(0), random_image(1, size=(20, 90))], return_tensors="pt")["pixel_values"]
    assert batch.shape == (2, 3, 224, 224)
    torch.testing.assert_close(
        batch[1], image_processor(random_image(1, size=(20, 90)), return_tensors="pt")["pixel_values"][0]
    )


def test_steps_can_be_disabled(image_processor):
    image = random_image(size=(224, 224))
    np.testing.assert_array_equal(raw(image_processor, image), np.asarray(image))
    scaled = pixels_of(image_processor, image, do_normalize=False)
    np.testing.assert_allclose(scaled, np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-6)
    assert pixels_of(image_processor, random_image(size=(50, 30)), do_resize=False).shape == (3, 30, 50)
    assert pixels_of(image_processor, image, size={"height": 32, "width": 64}).shape == (3, 32, 64)


def test_inputs_that_are_not_images_are_refused(image_processor):
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        image_processor(["not an image"])
    with pytest.raises(ValueError, match="does not know do_sharpen"):
        image_processor(random_image(), do_sharpen=True)


@pytest.mark.parametrize(
    "images",
    [
        [],
        (),
        [[], []],
        None,
        5,
        b"bytes",
        {"image": 1},
        [None],
        [random_image(), None],
        [[random_image()], None],
        [[[random_image()]]],
        [1, 2],
        (one for one in [random_image()]),
        np.float32(1),
        np.zeros(9),
        np.zeros((2, 3, 30, 30, 3)),
        [np.zeros((30, 30, 3)), np.zeros((2, 30, 30, 3))],
        [random_image(), np.zeros(9)],
        np.array(["a", "b"]),
        np.full((30, 30, 3), None),
        np.zeros((0, 30, 3)),
        Image.new("RGB", (0, 5)),
        Image.new("F", (5, 5), float("nan")),
        np.full((30, 30, 3), np.nan, np.float32),
        np.full((30, 30), np.inf),
        np.full((30, 30), 1e300),
        torch.full((3, 30, 30), float("nan")),
        torch.full((30, 30), -float("inf"), dtype=torch.bfloat16),
        torch.zeros(3, 30, 30).to(torch.float8_e4m3fn),
        torch.zeros(3, 30, 30).to_sparse(),
        torch.zeros(3, 30, 30, device="meta"),
        torch.zeros(3, 30, 30, dtype=torch.complex64),
    ],
    ids=lambda images: type(images).__name__,
)
def test_anything_but_images_with_finite_pixels_is_a_value_error(image_processor, images):
    with pytest.raises(ValueError, match=r"image") as caught:
        image_processor(images)
    assert len(str(caught.value)) < 300


def test_grey_arrays_of_two_dimensions_are_images(image_processor):
    grey = random_image(size=(50, 40)).convert("L")
    want = pixels_of(image_processor, grey)
    array = np.asarray(grey)
    tensor = torch.from_numpy(array.copy())
    for same in (array, [array], (array,), array.astype(np.float32), tensor, [tensor, tensor]):
        np.testing.assert_allclose(pixels_of(image_processor, same), want, atol=0.02)
    assert image_processor([grey, array, tensor], return_tensors="pt")["pixel_values"].shape == (3, 3, 224, 224)


def test_images_in_a_tuple_a_list_of_lists_and_a_batch(image_processor):
    array = np.asarray(random_image())
    for images in (
        (array, array),
        [[array], [array]],
        [[array, array]],
        np.stack([array] * 2),
        [np.stack([array] * 2)],
    ):
        assert len(image_processor(images)["pixel_values"]) == 2


def test_unsupported_arguments_are_refused(tmp_path, image_processor):
    for name, value in (
        ("crop_size", {"height": 32, "width": 32}),
        ("crop_size", 32),
        ("do_pad", True),
        ("pad_size", 9),
    ):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            image_processor(random_image(), **{name: value})
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            NanoVLMImageProcessor(**{name: value})
    with pytest.raises(ValueError, match="device needs return_tensors"):
        image_processor(random_image(), device="cuda")
    # Arguments that Transformers passes to every image processor are accepted.
    nothing = {"crop_size": None, "do_pad": None, "pad_size": None, "device": "cpu", "disable_grouping": True}
    assert image_processor(random_image(), return_tensors="pt", **nothing)["pixel_values"].shape == (1, 3, 224, 224)
    assert image_processor(random_image(), return_tensors="pt", device="meta")["pixel_values"].device.type == "meta"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("size", bad) for bad in (0, -1, 100_000, "abc", [], {}, {"height": 64}, {"shortest_edge": 64}, True)),
        *(("size", {"height": bad, "width": 64}) for bad in (0, -5, 4097, 10**9, 2.5, "64", None, True, float("nan"))),
        *(
            ("image_mean", bad)
            for bad in ("abc", [], [0.5], ["a", "b", "c"], [0.5, 0.5], [0.5, float("nan"), 0.5], True)
        ),
        *(("image_std", bad) for bad in ([0.0, 1.0, 1.0], [-1, 1, 1], "abc", [[1], [1], [1]], 0, float("inf"))),
        *(("rescale_factor", bad) for bad in (0, "1/255", float("nan"), [1], True)),
        *(("resample", bad) for bad in (6, -1, "bicubic", 2.5, [3], True)),
        *(("do_resize", bad) for bad in ("no", 1, [])),
        ("do_convert_rgb", "yes"),
        ("do_center_crop", 0),
        ("do_rescale", "false"),
        ("do_normalize", {}),
    ],
    ids=str,
)
def test_invalid_settings_are_named(tmp_path, image_processor, name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        NanoVLMImageProcessor(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must"):
        image_processor(random_image(), **{name: value})
    image_processor.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"^{name} must"):
        NanoVLMImageProcessor.from_pretrained(tmp_path)


def test_equivalent_forms_of_settings(image_processor):
    want = pixels_of(image_processor, random_image(), size={"height": 64, "width": 64}, image_mean=[0.5] * 3)
    for size in (64, (64, 64), [64, 64], {"height": np.int32(64), "width": 64.0}):
        np.testing.assert_array_equal(pixels_of(image_processor, random_image(), size=size, image_mean=0.5), want)


def test_grey_images_without_conversion():
    settings = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    pixels = pixels_of(NanoVLMImageProcessor(**settings), random_image(mode="L"))
    assert pixels.shape == (1, 224, 224)
    with pytest.raises(ValueError, match="image_mean: 1 numbers for an image of 3 channels"):
        pixels_of(NanoVLMImageProcessor(**settings), random_image())


def test_invalid_metadata_is_ignored(image_processor):
    image = plain("red", (40, 80))
    image.paste("blue", (0, 40, 40, 80))
    want = raw(image_processor, image)
    for lie in (b"Exif\0\0", b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"\xff" * 40):
        image.info["exif"] = lie
        np.testing.assert_array_equal(raw(image_processor, image), want)


def test_round_trip(tmp_path, image_processor):
    image_processor.do_center_crop = True
    image_processor.save_pretrained(tmp_path)
    assert NanoVLMImageProcessor.from_pretrained(tmp_path).to_dict() == image_processor.to_dict()
