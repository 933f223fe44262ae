import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from nanovlm_hf import NanoVLMImageProcessor


@pytest.fixture
def image_processor():
    return NanoVLMImageProcessor()


def pixels_of(image_processor, image, **kwargs) -> np.ndarray:
    return image_processor(image, return_tensors="np", **kwargs)["pixel_values"][0]


def raw(image_processor, image, **kwargs) -> np.ndarray:
    """8-bit values, channels last."""
    return pixels_of(
        image_processor, image, do_rescale=False, do_normalize=False, data_format="channels_last", **kwargs
    )


def plain(colour, size=(60, 40)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_values_are_normalised_with_imagenets_mean(image_processor):
    pixels = pixels_of(image_processor, plain((255, 0, 128)))
    want = (np.array([1.0, 0.0, 128 / 255]) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert pixels.shape == (3, 224, 224)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, np.broadcast_to(want[:, None, None], pixels.shape), atol=1e-5)


def test_a_photo_is_squashed_by_default_and_cropped_on_request(image_processor):
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
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    image.info["exif"] = exif.tobytes()
    upright = raw(image_processor, image)
    assert (upright[:, :90, 2] > 200).all()
    assert (upright[:, 130:, 0] > 200).all()


def test_transparency_lies_over_white(image_processor):
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
def test_every_mode_becomes_rgb(image_processor, image, want):
    pixels = raw(image_processor, image)
    assert pixels.shape == (224, 224, 3)
    assert (np.abs(pixels.astype(int) - want) <= 1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (2000, 3), (224, 224)])
def test_every_size(image_processor, size):
    assert pixels_of(image_processor, picture(size=size)).shape == (3, 224, 224)


def test_arrays_and_tensors_equal_the_picture(image_processor):
    image = picture()
    want = pixels_of(image_processor, image)
    array = np.asarray(image)
    for same in (array, array.transpose(2, 0, 1), torch.from_numpy(array.copy()), array.astype(np.float32) / 255):
        np.testing.assert_allclose(pixels_of(image_processor, same), want, atol=1e-5)


def test_several_pictures_make_a_batch(image_processor):
    batch = image_processor([picture(0), picture(1, size=(20, 90))], return_tensors="pt")["pixel_values"]
    assert batch.shape == (2, 3, 224, 224)
    torch.testing.assert_close(
        batch[1], image_processor(picture(1, size=(20, 90)), return_tensors="pt")["pixel_values"][0]
    )


def test_steps_can_be_left_out(image_processor):
    image = picture(size=(224, 224))
    np.testing.assert_array_equal(raw(image_processor, image), np.asarray(image))
    scaled = pixels_of(image_processor, image, do_normalize=False)
    np.testing.assert_allclose(scaled, np.asarray(image).transpose(2, 0, 1) / 255, atol=1e-6)
    assert pixels_of(image_processor, picture(size=(50, 30)), do_resize=False).shape == (3, 30, 50)
    assert pixels_of(image_processor, image, size={"height": 32, "width": 64}).shape == (3, 32, 64)


def test_what_is_no_picture_is_refused(image_processor):
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        image_processor(["not a picture"])
    with pytest.raises(ValueError, match="does not know do_sharpen"):
        image_processor(picture(), do_sharpen=True)


def test_round_trip(tmp_path, image_processor):
    image_processor.do_center_crop = True
    image_processor.save_pretrained(tmp_path)
    assert NanoVLMImageProcessor.from_pretrained(tmp_path).to_dict() == image_processor.to_dict()
