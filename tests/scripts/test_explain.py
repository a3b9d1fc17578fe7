"""explain.py: exact maps, the page as a browser shows it, the pointing game's geometry."""

import base64
import csv
import importlib
import io
import json
import re
import shutil

import numpy as np
import pydicom
import pytest
import torch
from conftest import PLANES, assert_one_line_error, finding_of, page_content, run_script
from PIL import Image, ImageDraw
from pydicom.uid import MRImageStorage

import explain
from dataloader import preprocess
from model import MRNet
from mrnet.errors import InputError
from mrnet.evaluation.figures import heat_colours, overlay
from mrnet.inference.answering import Options
from mrnet.inference.exams import Exam
from mrnet.inference.explanation import Finding, PlaneMaps, explain_networks
from mrnet.inference.task_models import Network, TaskModels
from mrnet.networks.receptive_fields import upsample_maps
from mrnet.reports.explain_page import (
    NOTICE,
    animation,
    contact_sheet,
    describe_finding,
    fill,
    headline,
    make_page,
    mirroring,
    wrap,
)
from mrnet.runtime import devices
from mrnet.stacking.stacking import Decision
from tools import pointing_game


def random_network(seed=0):
    torch.manual_seed(seed)
    return MRNet().eval()


@pytest.mark.parametrize("slices, height, width", [(1, 63, 63), (7, 100, 140), (24, 256, 256)])
def test_maps_and_bias_are_the_logit(slices, height, width):
    model = random_network()
    volume = torch.randn(slices, 1, height, width)
    maps, logit = model.heat_maps(volume)
    with torch.inference_mode():
        expected = model(volume[None]).item()
    assert logit == expected
    total = maps.sum(dtype=np.float64) + model.classifier.bias.item()
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.skipif(not devices.has_bf16(torch.device("cpu")), reason="needs bf16 instructions")
def test_maps_add_up_in_bf16_too():
    model, volume = random_network(), torch.randn(9, 1, 128, 128)
    with devices.autocast(torch.device("cpu"), "bf16"):
        maps, logit = model.heat_maps(volume)
        with torch.inference_mode():
            expected = model(volume[None]).item()
    total = maps.sum(dtype=np.float64) + model.classifier.bias.item()
    assert logit == expected == pytest.approx(total, abs=1e-4)


def test_maps_are_gradient_times_activation():
    """A second derivation by autograd: the head is linear in what it takes of the last maps."""
    model = random_network(1)
    volume = torch.randn(6, 1, 128, 96)
    features = model.feature_maps(volume).detach().requires_grad_()
    pooled = features.mean(dim=(2, 3)).amax(dim=0)
    model.classifier(pooled).sum().backward()
    expected = (features * features.grad).sum(dim=1).detach().numpy()
    maps, _ = model.heat_maps(volume)
    np.testing.assert_allclose(maps, expected, atol=1e-6)


@pytest.mark.parametrize("row, column", [(40, 40), (127, 95), (200, 60), (95, 220)])
def test_maps_point_at_a_planted_square(row, column):
    """A network of positive weights sees brightness only, so its map must peak at the square."""
    model = random_network(2)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.abs_() if name.endswith("weight") else weights.zero_()
    volume = np.zeros((9, 256, 256), np.uint8)
    volume[6, row - 12 : row + 12, column - 12 : column + 12] = 255
    fed = preprocess(torch.from_numpy(volume), "raw")
    maps, _ = model.heat_maps(fed)
    found = pointing_game.strongest_voxel(maps, "alexnet")
    assert found[0] == 6
    assert np.abs(found[1:] - (row, column)).max() <= 24  # a cell is 32 px, its pooling 96
    big = upsample_maps(maps, 256, 256, "alexnet")
    peak = np.unravel_index(big.argmax(), big.shape)
    assert peak[0] == 6 and np.abs(np.array(peak[1:]) - (row, column)).max() <= 24


def test_colours_are_clear_at_zero_and_strong_at_the_ends():
    volume = np.full((2, 64, 64), 90, np.uint8)
    assert (overlay(volume, np.zeros((2, 1, 1), np.float32), "alexnet") == 90).all()
    colours = heat_colours().astype(int)
    yellow, cyan = colours[255], colours[0]
    assert yellow[0] > yellow[2] + 60 and cyan[2] > cyan[0] + 60
    light = colours @ (0.2126, 0.7152, 0.0722)  # rises from the middle to either end
    assert (np.diff(light[140:]) > -1).all() and (np.diff(light[:116]) < 1).all()


# --- pointing game --------------------------------------------------------------------------------


def test_near_is_a_distance_in_millimetres():
    box = [(np.array([10.0, 10, 10]), np.array([20.0, 30, 40]))]
    points = np.array([[15, 20, 30], [20 + 14.9, 20, 30], [20 + 15.1, 20, 30], [29, 42, 30]], float)
    assert pointing_game.near(points, box).tolist() == [True, True, False, True]  # 9, 12 -> 15 mm
    assert pointing_game.near(points[2], [*box, (np.array([30.0, 0, 0]), np.array([50.0, 99, 99]))])


def test_chance_is_the_share_of_the_limb_that_would_hit():
    volume = np.zeros((5, 128, 128), np.uint8)
    volume[:, 32:96, 32:96] = 200
    step = np.array([5.0, 1.0, 1.0])
    low, high = np.array([0.0, 64, 0]), np.array([20.0, 200, 200])
    # The lower half of the square, and the 15 mm above it.
    assert pointing_game.chance_of(volume, step, [(low, high)]) == pytest.approx(
        (32 + 15) / 64, abs=0.06
    )


def test_pointing_game_prints_every_task_and_plane(trained):
    work, _ = trained
    done = run_script("tools/pointing_game.py", work / "data", "--models-dir",
                      work / "models", "--task", "acl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for plane in PLANES:
        assert re.search(rf"^acl +{plane} +\d", done.stdout, re.M)


def test_pointing_game_needs_lesions(trained, exams):
    done = run_script("tools/pointing_game.py", exams, "--models-dir", trained[0] / "models")
    assert_one_line_error(done, "lesions.json", "phantom")


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(trained, tmp_path_factory):
    """One validation exam explained: the folder, and what was said."""
    work, out = trained[0], tmp_path_factory.mktemp("explained")
    done = run_script("explain.py", work / "data", "--exam", "valid/0020", "--task", "acl",
                      "--models-dir", work / "models", "--out", out,
                      "--precision", "fp32")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_page_says_what_was_predicted(trained, explained):
    work, (out, said) = trained[0], explained
    done = run_script("predict.py", work / "data", "--jsonl", "--models-dir", work / "models",
                      "--precision", "fp32")  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    row = next(r for r in rows if (r["source"], r["exam"]) == ("valid", "0020"))
    page = out / "0020-acl.html"
    finding, images = finding_of(page), page_content(page)["images"]
    assert finding["decision"]["probability"] == pytest.approx(row["stack"], abs=1e-6)
    assert finding["decision"]["label"] == row["decision"] and row["decision"] in said
    for plane in finding["planes"]:
        assert plane["probability"] == pytest.approx(row[plane["plane"]], abs=1e-6)
        assert sum(plane["sums"]) + plane["bias"] == pytest.approx(plane["logit"], abs=1e-4)
        assert len(images[plane["image"]]["slices"]) == len(plane["sums"])


def test_page_loads_nothing_from_anywhere(explained):
    text = (explained[0] / "0020-acl.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|<link|src=[\"'](?!data:)", text)
    assert "default-src 'none'" in text and "Research use only" in text


def test_picture_and_film(explained):
    sheet = Image.open(explained[0] / "0020-acl.png")
    assert sheet.width >= 1000 and np.asarray(sheet.convert("RGB")).std() > 20
    film = Image.open(explained[0] / "0020-acl.gif")
    images = page_content(explained[0] / "0020-acl.html")["images"]
    slices = max(len(image["slices"]) for image in images.values())
    assert film.n_frames == slices and film.info["loop"] == 0


def maps_of(slices=3, plane="axial", joined=()):
    """PlaneMaps of noise."""
    rng = np.random.default_rng(slices)
    return PlaneMaps(
        plane=plane,
        joined=joined or (plane,),
        volume=rng.integers(0, 200, (slices, 64, 64), np.uint8),
        maps=rng.normal(size=(slices, 2, 2)).astype(np.float32),
        backbone="alexnet",
        logit=0.5,
        others=0.0,
        bias=0.1,
        probability=0.6,
        networks=["alexnet, maximum over slices"],
    )


MIRRORED_SET = {"name": "phantom", "version": "9", "synthetic": True, "mirrored": True}
MIRRORS = TaskModels("acl", {}, None, "d", [MIRRORED_SET], 0.5)


@pytest.fixture
def mirrored():
    """A Finding of networks that see right knees as left ones."""
    return Finding(MIRRORS, {"axial": maps_of()}, Decision(0.6, 0.5, "positive", ["axial"]), {})


RIGHT, LEFT, UNKNOWN = "This right knee is shown mirrored", "This left knee is", "Right knees that"


@pytest.mark.parametrize("name, origin, said", [
    ("0123456789abcdef-R", None, RIGHT), ("0123456789abcdef-L", None, LEFT),
    ("0123456789abcdef", None, UNKNOWN), ("knee-R", None, UNKNOWN),  # named by somebody else
    ("0123456789abcdef", {"side": "R"}, RIGHT), ("0123456789abcdef-R", "no study", RIGHT),
])  # fmt: skip
def test_it_is_said_how_this_knee_is_shown(mirrored, name, origin, said):
    exam = Exam(name, "", {}, {}, "hash", origin=origin)
    assert mirroring(exam, mirrored.models).startswith(said)
    assert describe_finding(exam, mirrored)["mirrored"].startswith(said)
    plain = mirrored.models._replace(datasets=[{"synthetic": True, "mirrored": False}, None])
    assert mirroring(exam, plain) == ""


def test_what_is_filled_in_is_no_template():
    page = fill("<title>{{title}}</title>{{notice}}:{{data}}", "{{data}}", {"exam": "{{notice}}"})
    assert page == f'<title>{{{{data}}}}</title>{NOTICE}:{{"exam": "{{{{notice}}}}"}}'


def test_networks_that_join_planes_have_titles_of_their_own(mirrored):
    alone, joint = maps_of(), maps_of(joined=("axial", "sagittal"))._replace(probability=0.7)
    assert (alone.title, joint.title) == ("axial", "axial of axial+sagittal")
    finding = mirrored._replace(planes={one.title: one for one in (alone, joint)})
    assert finding.probabilities == {"axial": 0.6, "axial+sagittal": 0.7}
    said = describe_finding(Exam("7", "", {}, {}, "hash"), finding)
    assert [one["image"] for one in said["planes"]] == ["axial", "axial"]
    assert [one["column"] for one in said["planes"]] == ["axial", "axial+sagittal"]
    assert said["missing"] == ["coronal", "sagittal"]


@pytest.mark.parametrize("channels, words", [
    ("grey", "alexnet, maximum over slices"),
    ("neighbours", "alexnet, maximum over slices, each slice with its neighbours"),
])  # fmt: skip
def test_networks_that_see_neighbours_say_so(channels, words):
    network = Network(
        MRNet().eval(), ("axial",), "standardized", channels, False, "d", {"axial": [1, 9]}
    )
    volumes = {"axial": np.zeros((3, 64, 64), np.uint8)}
    found, _ = explain_networks([network], volumes, torch.device("cpu"), "fp32", {})
    assert found["axial"].networks == [words]
    assert found["axial"].neighbours == (channels == "neighbours")


@pytest.mark.parametrize("probability, threshold, said", [
    (0.5040, 0.5043, "stack 0.5040, threshold 0.5043: x"), (0.5, 0.5, "stack 0.50, threshold 0.50"),
    (0.2, 0.7, "stack 0.20, threshold 0.70: x"), (0.1 + 0.2, 0.3, "stack 0.30, threshold 0.30: x"),
])  # fmt: skip
def test_figures_do_not_contradict_the_decision(mirrored, probability, threshold, said):
    finding = mirrored._replace(decision=Decision(probability, threshold, "x", ["axial"]))
    assert said in headline(Exam("7", "", {}, {}, "hash"), finding)


def test_small_figures_in_a_browser(browser, mirrored, tmp_path):
    """The ends of the colour bar, and a probability close to the threshold."""
    one = maps_of()
    one = one._replace(maps=one.maps * (0.0049 / one.scale), neighbours=True)
    decision = Decision(0.5040, 0.5043, "negative", ["axial"])
    finding = mirrored._replace(planes={"axial": one}, decision=decision)
    page = tmp_path / "page.html"
    page.write_text(make_page(Exam("7", "", {}, {}, "hash"), [finding]))
    browser.get(page.as_uri())
    ends = browser.find_elements("css selector", ".bar span")
    assert [end.text for end in ends[:2]] == ["−0.0049", "+0.0049"]
    text = browser.find_element("tag name", "body").text
    assert "stacked 0.5040, threshold 0.5043" in text
    assert "see each slice with the one before" in text


def test_nothing_of_earlier_results_stays_where_there_is_no_answer(mirrored, tmp_path, monkeypatch):
    pytest.importorskip("highdicom", reason="pip install -r requirements-dicom-results.txt")
    folder = tmp_path / "dicom" / "abc"
    (folder / "acl-axial").mkdir(parents=True)
    for name in ("report-acl.dcm", "acl-axial/0001.dcm", "report-cyst.dcm"):
        (folder / name).touch()
    finding = mirrored._replace(planes={}, decision=None, unusable={"axial": "gap"})
    monkeypatch.setattr(explain, "explain_exam", lambda *_: [finding])
    exam = Exam("abc", "", {}, {}, "hash", origin={"side": "L"})
    output = explain.Output(tmp_path / "report", False, tmp_path / "dicom")
    with pytest.raises(InputError, match="gap"):
        explain.explain_one(exam, [MIRRORS], output, Options(torch.device("cpu"), "fp32", False))
    assert [path.name for path in folder.iterdir()] == ["report-cyst.dcm"]


def test_words_wrap_to_the_width():
    lines = wrap("one two three fourteen a", 6, len)
    assert lines == ["one", "two", "three", "fourte", "en a"]
    assert wrap("", 6, len) == [""]


@pytest.mark.parametrize("planes", [1, 3])
def test_all_that_is_said_is_in_the_pictures(mirrored, monkeypatch, planes):
    """A long headline, and that the knee is mirrored, within the edges."""
    names = PLANES[:planes]
    finding = mirrored._replace(planes={name: maps_of(plane=name) for name in names})
    exam = Exam("0123456789abcdef-R", "", {}, {}, "hash")
    words = headline(exam, finding) + ", words" * 30, mirroring(exam, finding.models)
    sheet = contact_sheet(finding.planes, *words)
    sheet.draw_without_rendering()
    said = [sheet._suptitle, sheet._supxlabel]
    for text, wanted in zip(said, words, strict=True):
        assert wanted in text.get_text().replace("\n", " ")
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= sheet.bbox.x1 and box.y1 <= sheet.bbox.y1
    assert not any(said[0].get_window_extent().overlaps(axes.title.get_window_extent())
                   for axes in sheet.axes)  # fmt: skip

    drawn, draw = [], ImageDraw.ImageDraw.text

    def keep(self, at, text, *more):
        drawn.append((text, self.textbbox(at, text)))
        draw(self, at, text, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", keep)
    frame = animation(finding.planes, *words)[0]
    text = " ".join(text for text, _ in drawn)
    assert all(one in text for one in words)
    assert all(box[2] <= frame.width and box[3] <= frame.height for _, box in drawn)


def test_a_name_cannot_put_code_into_the_page(trained, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    source = trained[0] / "data" / "valid" / "axial" / "0020.npy"
    (tmp_path / "axial").mkdir()
    shutil.copy(trained[0] / "data" / "dataset.json", tmp_path)
    shutil.copy(source, tmp_path / "axial" / f"{name}.npy")
    done = run_script("explain.py", tmp_path, "--task", "acl", "--models-dir",
                      trained[0] / "models", "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "out").glob("*.html")
    assert "<img src=x" not in page.read_text(encoding="utf-8")
    assert page_content(page)["exam"] == name
    assert finding_of(page)["missing"] == ["coronal", "sagittal"]


def test_which_exam_in_one_line(trained, tmp_path):
    args = ("--task", "acl", "--models-dir", trained[0] / "models", "--out", tmp_path)
    data = trained[0] / "data"
    assert_one_line_error(run_script("explain.py", data, *args), "30 exams", "--exam")
    assert_one_line_error(run_script("explain.py", data, "--exam", "999", *args), "--exam")
    assert_one_line_error(
        run_script("explain.py", data, "--exam", "20", "--task", "cyst", *args[2:]), "cyst", "acl"
    )


def test_a_number_in_both_splits_is_of_two_exams(trained, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split / "axial").mkdir(parents=True)
        volume = trained[0] / "data" / "valid" / "axial" / "0020.npy"
        shutil.copy(volume, tmp_path / split / "axial")
    shutil.copy(trained[0] / "data" / "dataset.json", tmp_path)
    args = ("--models-dir", trained[0] / "models", "--task", "acl", "--out", tmp_path / "out")
    done = run_script("explain.py", tmp_path, "--exam", "20", *args)
    assert_one_line_error(done, "2 exams called 20; give --exam", "train/0020, valid/0020")
    assert not (tmp_path / "out").exists()
    done = run_script("explain.py", tmp_path, "--exam", "valid/20", *args)
    assert done.returncode == 0, done.stderr


# --- from DICOM, as README says ------------------------------------------------------------------


def write_dicom(data, exam_id, out):
    """A phantom exam as a scanner would export it: three series, a file a slice, fine pixels."""
    entry = json.loads((data / "lesions.json").read_text())[str(exam_id)]
    for number, (plane, cut) in enumerate(entry["planes"].items(), start=1):
        volume = np.load(data / entry["split"] / plane / f"{exam_id:04d}.npy")
        # Unit vectors along slices, rows and columns of the volume, in DICOM's coordinates.
        along = np.zeros((3, 3))
        along[range(3), cut["axes"]] = cut["directions"]
        start = np.zeros(3)
        start[cut["axes"]] = np.array(cut["start_mm"]) * cut["directions"]
        fine = volume.repeat(4, axis=1).repeat(4, axis=2)
        start -= (along[1] + along[2]) * cut["step_mm"][1] * 3 / 8  # the middle of the first pixel
        for i, image in enumerate(fine):
            ds = pydicom.Dataset()
            ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, pydicom.uid.generate_uid()
            ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", f"1.2.3.{number}"
            ds.PatientName, ds.PatientID, ds.Modality = "DOE^JOHN", "4711", "MR"
            ds.SeriesNumber, ds.SeriesDescription = number, f"PD FS {plane}"
            ds.ImageOrientationPatient = [*along[2], *along[1]]
            position = start + i * cut["step_mm"][0] * along[0]
            ds.ImagePositionPatient = [f"{v:.8g}" for v in position]
            ds.PixelSpacing = [cut["step_mm"][1] / 4] * 2
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
            ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
            ds.Rows, ds.Columns = image.shape
            ds.PixelData = (image.astype("<u2") * 7).tobytes()
            ds.file_meta = pydicom.dataset.FileMetaDataset()
            ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            out.mkdir(parents=True, exist_ok=True)
            ds.save_as(out / f"{number}-{i:03d}.dcm", enforce_file_format=True)
    return out


@pytest.mark.whole
def test_readmes_commands_from_dicom_to_the_page(trained, tmp_path):
    scan = write_dicom(trained[0] / "data", 20, tmp_path / "knee7")
    models = ("--models-dir", trained[0] / "models", "--allow-synthetic")
    done = run_script("predict.py", scan, "--out", tmp_path / "knee7.csv", *models)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = csv.DictReader((tmp_path / "knee7.csv").read_text().splitlines())
    assert row["planes"] == "axial+coronal+sagittal" and row["decision"]
    done = run_script("explain.py", scan, "--task", "acl", "--out", tmp_path / "report", *models)
    assert done.returncode == 0, done.stdout + done.stderr
    (page,) = (tmp_path / "report").glob("*.html")
    images = page_content(page)["images"]
    for plane in PLANES:  # the very slices of the exam, in their order
        volume = np.load(trained[0] / "data" / "valid" / plane / "0020.npy")
        assert len(images[plane]["slices"]) == len(volume)
        for uri, image in zip(images[plane]["slices"], volume, strict=True):
            picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
            shown = np.asarray(picture.resize(image.shape[::-1]), float).ravel()
            assert np.corrcoef(shown, image.ravel())[0, 1] > 0.97
    # Pictures and maps in base64 may spell anything, and so may numbers and hashes.
    text = re.sub(
        r"[A-Za-z0-9+/=]{60,}|\d+\.\d+|[0-9a-f]{16}", "", page.read_text(encoding="utf-8")
    )
    assert '"plane": "axial"' in text and "DOE" not in text and "4711" not in text


# --- the page in a browser ------------------------------------------------------------------------


PIXELS = """
const canvas = document.querySelectorAll("canvas.view")[arguments[0]];
return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]
"""


COLOUR = 40  # grey levels between red, green and blue; a grey slice has 0


def test_page_in_a_browser(browser, explained, tmp_path):
    page = explained[0] / "0020-acl.html"
    images, planes = page_content(page)["images"], finding_of(page)["planes"]
    browser.get(page.as_uri())
    find = browser.find_elements
    sections, sliders = find("css selector", "section"), find("css selector", "input.slice")
    assert [s.get_attribute("aria-label") for s in sections] == list(PLANES)

    def pixels(plane):
        data = np.array(browser.execute_script(PIXELS, plane), np.uint8)
        image = images[planes[plane]["image"]]
        size = image["height"], image["width"], 4
        return data.reshape(size)[..., :3].astype(int)

    def colourful(plane):
        return bool(np.ptp(pixels(plane), axis=2).max() > COLOUR)

    move = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    for plane, slider in enumerate(sliders):  # opens at the slice that adds most
        parts = planes[plane]["sums"]
        assert int(slider.get_attribute("value")) == int(np.argmax(parts)) + 1
        browser.execute_script(move, slider, int(np.argmax(np.abs(parts))) + 1)
    waiting = importlib.import_module("selenium.webdriver.support.wait")
    waiting.WebDriverWait(browser, 10).until(lambda _: all(map(colourful, range(3))))

    # The heat map goes and comes back, by the box and by the key.
    heat = browser.find_element("id", "heat")
    heat.click()
    assert not any(map(colourful, range(3)))
    browser.find_element("tag name", "body").send_keys("h")
    assert all(map(colourful, range(3)))

    # Opacity 0 leaves the grey slice.
    opacity = browser.find_element("id", "opacity")
    browser.execute_script(move, opacity, 0)
    assert not colourful(0)
    browser.execute_script(move, opacity, 70)

    # Sliders and arrow keys move one plane, to the slice that they say.
    others = pixels(1)
    browser.execute_script(move, sliders[0], 1)
    assert "slice 1 of" in sections[0].text and (pixels(1) == others).all()
    find("css selector", "section")[0].find_element("tag name", "h2").click()
    browser.find_element("tag name", "body").send_keys("\ue014")  # arrow right
    assert sliders[0].get_attribute("value") == "2"
    best = sections[0].find_elements("css selector", "li button")[0]
    best.click()
    assert int(sliders[0].get_attribute("value")) == int(np.argmax(planes[0]["sums"])) + 1

    picture = tmp_path / "page.png"
    assert browser.save_screenshot(str(picture))
    assert np.asarray(Image.open(picture).convert("L")).std() > 10
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
