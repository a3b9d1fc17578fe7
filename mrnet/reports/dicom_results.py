"""An explained exam as DICOM: heat maps as a series of its study, probabilities as a report.

    OUT/<exam>/acl-axial/0001.dcm   Secondary Capture, colour, a slice each, where the source's lie
    OUT/<exam>/report-<task>.dcm    Enhanced SR by template TID 1500, Measurement Report

Both by highdicom, and both say "research use only". Files only: nothing is sent anywhere. UIDs are
hashes of the input, the finding's own networks and this code's version, so the same answer has the
same UIDs, whichever other findings are asked for beside it.
"""

import glob
import hashlib
import json
import re
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from highdicom import sr
from highdicom.sc import SCImage
from PIL import Image, ImageDraw
from pydicom import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import DA, DS, TM

from mrnet.errors import InputError, RunError
from mrnet.evaluation.figures import overlay
from mrnet.files import atomic
from mrnet.inference.answering import model_of
from mrnet.layout.planes import ALL_PLANES, ORIENTATION, PLANES, view_of
from mrnet.layout.volumes import SIDE
from mrnet.reports.explain_page import NOTICE, SYNTHETIC_ONLY, wrap
from mrnet.runtime.provenance import code_version, git_sha
from mrnet.scans.files import quiet

MAKER, MODEL = "MRNet project", "MRNet"
SCHEME = "99MRNET"  # designator of our own codes; private ones begin with 99 (PS3.16 8.2)
# Of the series' numbers, which are below 2**31 (PS3.5 6.2): scanners count from 1, ours begin here;
# a block for each task, in it a part for each side, in it the planes and last the report.
FIRST_SERIES, TASKS, OF_A_TASK = 10_000, 1_700_000, 1200
OF_A_SIDE = {"": 0, "L": 400, "R": 800}
JOINT_PLACES, REPORT_NUMBER = 350, 399
SIDE_WORDS = {"L": "left ", "R": "right "}
LO = 64  # characters of a description
BURNT_IN = "RESEARCH USE ONLY"
# Attributes of patient and study that must be there and may be empty.
TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
          "StudyTime", "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
DATE, TIME = r"[0-9]{8}", r"[0-9]{2}([0-9]{2}([0-9]{2}([.][0-9]{1,6})?)?)?"
FORMS = {"PatientSex": ("[MFO]", str), "PatientBirthDate": (DATE, DA), "StudyDate": (DATE, DA),
         "StudyTime": (TIME, TM)}  # fmt: skip
TEXT = 11  # px, of what is burnt in
FEET_AND_HEAD = str.maketrans("IS", "FH")  # as PatientOrientation calls inferior and superior


class Origin(NamedTuple):
    """What mrnet/scans/origin.py says of an exam, ready to refer to."""

    study: Dataset  # patient and study
    planes: dict
    side: str
    key: str  # of all that the results depend on
    warnings: tuple = ()  # as exams.Exam has them

    def uid(self, *words):
        """A UID that is the same for the same results."""
        return generate_uid(entropy_srcs=[self.key, *map(str, words)])

    def title(self, task):
        """A finding with the knee's side, as a viewer's list tells its series apart."""
        return f"{SIDE_WORDS.get(self.side, '')}{task}"

    def series_number(self, task, place):
        """The number of a series: the same in every run, another for each knee and task of a study.

        Args:
            place: of the plane among the task's, or REPORT_NUMBER.
        """
        block = number_for(task, TASKS)
        return FIRST_SERIES + block * OF_A_TASK + OF_A_SIDE.get(self.side, 0) + place

    def sources(self, plane):
        """The source files of a plane as data sets that can be referred to."""
        for class_uid, instance, series, _ in self.planes[plane]["sources"]:
            source = Dataset()
            source.update(self.study)
            source.SOPClassUID, source.SOPInstanceUID = class_uid, instance
            source.SeriesInstanceUID, source.Modality = series, "MR"
            yield source


def read_origin(exam):
    """An exam's Origin.

    Raises:
        InputError: it is not from DICOM, or its headers cannot be referred to.
    """
    if not isinstance(exam.origin, dict):
        why = exam.origin or "it is not from DICOM, so there is no study to write to"
        raise InputError(f"exam {exam.name}: {why}")
    study = Dataset.from_json(json.dumps(exam.origin["study"]))
    if not study.get("StudyInstanceUID"):
        raise InputError(f"exam {exam.name}: its files have no StudyInstanceUID to belong to")
    for name in TYPE_2:
        study.setdefault(name, "")
    for element in study:  # each has one value; some headers give several
        if element.VM > 1:
            element.value = element.value[0]
    for name, (form, read) in FORMS.items():  # what does not keep to DICOM cannot be written again
        if not keeps_to(form, read, str(study.get(name) or "")):
            study[name].value = ""
    study.SpecificCharacterSet = "ISO_IR 192"  # UTF-8; the values are text by now
    # Both knees of a study have the same files; the name tells them apart.
    key = f"{exam.name} {exam.input} {code_version()}"
    planes = {plane: dict(place) for plane, place in exam.origin["planes"].items()}
    for plane, place in planes.items():  # one for all findings
        place["frame"] = place["frame"] or generate_uid(entropy_srcs=[key, "frame", plane])
    return Origin(study, planes, exam.side, key, exam.warnings)


def keeps_to(form, read, value):
    """Whether a text is of a form, and what `read` takes: 19700230 is no date.

    Args:
        form: regular expression.
        read: function that raises ValueError.
    """
    try:
        return bool(re.fullmatch(form, value)) and read(value) is not None
    except ValueError:
        return False


def write_results(exam, findings, options, out):
    """Write the heat maps and the report of an exam, in the place of what earlier networks said.

    Args:
        exam: exams.Exam with its origin.
        findings: list of explanation.Finding; of those without planes nothing is left there.
        options: answering.Options that they were found with.
        out: folder.

    Returns:
        [(folder or file, how many files)].

    Raises:
        InputError: there is no study to write to, or its header cannot be repeated.
    """
    folder = out / exam.name
    tasks, findings = [f.task for f in findings], [f for f in findings if f.planes]
    if not findings:
        remove_others(folder, tasks, ())
        return []
    with quiet():
        try:
            known, written, reports = read_origin(exam), [], []
            for finding in findings:
                model = model_of([finding.models], options)
                origin = known._replace(key=f"{known.key} {model}")
                for one in finding.planes.values():
                    series = heat_map_series(finding, one, origin)
                    place = folder / f"{finding.task}-{one.title.replace(' ', '-')}"
                    written.append(save_series(series, place))
                path = folder / report_name(finding.task)
                save(make_report(finding, origin), path)
                reports.append((path, 1))
            written += reports
            remove_others(folder, tasks, [place for place, _ in written])
            return written
        except (ValueError, TypeError, AttributeError) as error:  # their texts quote the patient
            raise InputError(
                f"exam {exam.name}: its patient or study cannot be written again "
                f"({type(error).__name__}); correct its header, or leave out --dicom"
            ) from None


def save_series(series, place):
    """Write a series, and nothing else of an earlier, longer one stays: folder, number of files."""
    paths = [place / f"{image.InstanceNumber:04d}.dcm" for image in series]
    for image, path in zip(series, paths, strict=True):
        save(image, path)
    for path in set(place.glob("[0-9][0-9][0-9][0-9].dcm")) - set(paths):
        path.unlink()
    return place, len(paths)


def remove_others(folder, tasks, written):
    """Remove the series and reports of some tasks that an earlier answer left in an exam's folder.

    Args:
        written: paths of those of this answer.
    """
    names = [f"{glob.escape(task)}-{plane}*" for task in tasks for plane in PLANES]
    named = [f"{name}/[0-9][0-9][0-9][0-9].dcm" for name in names]
    for path in [path for pattern in named for path in folder.glob(pattern)]:
        if path.parent not in written:
            path.unlink()
            with suppress(OSError):  # something else lies there
                path.parent.rmdir()
    for path in {folder / report_name(task) for task in tasks} - set(written):
        path.unlink(missing_ok=True)


def report_name(task):
    """File name of what a task's networks say: a report each, as tasks are explained one by one."""
    return f"report-{task}.dcm"


def save(dataset, path):
    with atomic(path) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)


# --- heat maps ------------------------------------------------------------------------------------


def number_for(text, count):
    """A number below `count` for a text, the same in every run."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % count


def place_of(one):
    """The place of a PlaneMaps among the series of a finding, whichever planes an exam has."""
    if one.is_joint:
        return len(ALL_PLANES) + number_for(one.title, JOINT_PLACES)
    return ALL_PLANES.index(one.plane)


def heat_map_series(finding, one, origin):
    """The slices of a PlaneMaps with their heat maps: list of SCImage, one a slice."""
    plane = one.plane
    place = origin.planes[plane]
    if len(place["positions"]) != len(one.volume) or one.volume.shape[1] != SIDE:
        raise RunError(f"{plane}: its slices are not those that were converted")
    pictures = overlay(one.volume, one.maps, one.backbone)
    order, what = np.arange(len(pictures)), "slice"
    if place["mirrored"]:  # back to the side that the patient has it on
        if view_of(plane) == "sagittal":
            order, what = order[::-1], "page's slice"  # which counts as the networks do
        else:
            pictures = pictures[:, :, ::-1]
    images = []
    for k, (at, position) in enumerate(zip(order, place["positions"], strict=True)):
        words = [f"{origin.title(finding.task)} {one.probability:.2f}, {one.title}"]
        words += [f"{what} {at + 1} of {len(order)}: {one.slice_sums[at]:+.2f}"]
        if finding.models.is_synthetic:
            words.append(SYNTHETIC_ONLY)
        picture = burn_in(pictures[at], words)
        image = secondary_capture(picture, one, finding.task, origin, k)
        image.ImageComments = comments(finding.task, one)
        image.ImagePositionPatient = [DS(x, auto_format=True) for x in position]
        images.append(image)
    return images


def comments(task, one):
    """What the colours of a PlaneMaps say, as ImageComments."""
    text = (
        f"{task}, class activation map: what each part of a slice adds to the logit of "
        f"{one.column}. Yellow speaks for the finding, cyan against it, what adds nothing is "
        f"clear; the strongest colours are +{one.scale:.2g} and -{one.scale:.2g} per cell. "
    )
    if one.neighbours:
        text += "Networks see each slice with its neighbours: what speaks may lie in one of these. "
    return text + NOTICE


def secondary_capture(picture, one, task, origin, k):
    """Slice k of a PlaneMaps as an SCImage that lies as its source does."""
    plane, title, study = one.plane, one.title, origin.study
    place = origin.planes[plane]
    image = SCImage.from_ref_dataset(
        next(origin.sources(plane)),
        np.ascontiguousarray(picture),
        "RGB",
        8,
        "PATIENT",
        series_instance_uid=origin.uid(task, title),
        series_number=origin.series_number(task, place_of(one)),
        sop_instance_uid=origin.uid(task, title, k),
        instance_number=k + 1,
        manufacturer=MAKER,
        manufacturer_model_name=MODEL,
        software_versions=git_sha(),
        series_description=f"{origin.title(task)} heat map, {title}"[:LO],
        pixel_spacing=place["spacing"],
        patient_orientation=[
            ORIENTATION[view_of(plane)][i].translate(FEET_AND_HEAD) for i in (2, 1)
        ],
        transfer_syntax_uid=ExplicitVRLittleEndian,
    )
    image.Laterality = origin.side  # of a pair, so it must be there, and may be empty
    image.BodyPartExamined = "KNEE"
    image.FrameOfReferenceUID = place["frame"]
    image.PositionReferenceIndicator = ""
    image.ImageOrientationPatient = [DS(x, auto_format=True) for x in place["orientation"]]
    image.SpacingBetweenSlices = DS(place["step"], auto_format=True)
    image.SliceThickness = place["thickness"] and DS(place["thickness"], auto_format=True)
    image.BurnedInAnnotation = "YES"
    for name, value in ({"LossyImageCompression": "00"} | place["lossy"]).items():
        setattr(image, name, value)
    image.DerivationDescription = "slice cut and resampled, class activation map in colour"
    near = place["used"][max(k - 1, 0) : k + 2] if one.neighbours else [place["used"][k]]
    used = dict.fromkeys(tuple(frame) for frames in near for frame in frames)
    refer(image, place["sources"], used)
    return of_study(image, study)


def of_study(dataset, study):
    """A data set with all that is known of its patient and study: highdicom repeats a part."""
    for element in study:
        if element.tag not in dataset:
            dataset[element.tag] = element
    return dataset


def refer(image, sources, used):
    """Point an image to the frames that it is made of (PS3.3 C.7.6.1.1.4, C.12.2).

    Args:
        sources: [SOP class, SOP instance and series UID, number of frames] of each file.
        used: (source, frame from 1) of each, in order.
    """
    frames, by_series = {}, {}
    for source, frame in used:
        frames.setdefault(source, []).append(frame)
    image.SourceImageSequence = []
    for source, numbers in frames.items():
        class_uid, instance, series, count = sources[source]
        item = reference(class_uid, instance)
        by_series.setdefault(series, []).append(reference(class_uid, instance))
        if len(numbers) < count:  # without numbers all frames are meant
            item.ReferencedFrameNumber = numbers if len(numbers) > 1 else numbers[0]
        purpose = codes.DCM.SourceImageForImageProcessingOperation
        item.PurposeOfReferenceCodeSequence = [sr.CodedConcept.from_code(purpose)]
        image.SourceImageSequence.append(item)
    image.ReferencedSeriesSequence = []
    for series, items in by_series.items():
        item = Dataset()
        item.SeriesInstanceUID, item.ReferencedInstanceSequence = series, items
        image.ReferencedSeriesSequence.append(item)


def reference(class_uid, instance):
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = class_uid, instance
    return item


def burn_in(picture, words):
    """A picture uint8 (H, W, 3) with lines of text at its top, wrapped, and BURNT_IN below."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    draw = ImageDraw.Draw(image)
    measure = partial(draw.textlength, font_size=TEXT)
    words = [part for line in words for part in wrap(line, image.width - 8, measure)]
    lines = [(3 + i * (TEXT + 2), line) for i, line in enumerate(words)]
    for top, line in [*lines, (image.height - TEXT - 5, BURNT_IN)]:
        draw.text((4, top), line, "white", font_size=TEXT, stroke_width=1, stroke_fill="black")
    return np.asarray(image)


# --- the report -----------------------------------------------------------------------------------


def make_report(finding, origin):
    """A task's probabilities and decision as a structured report: EnhancedSR by TID 1500."""
    observer = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[MAKER, code_version()]),
        name=f"{MODEL}, {NOTICE}"[:64],
        manufacturer_name=MAKER,
        model_name=MODEL,
    )
    context = sr.ObserverContext(
        observer_type=codes.DCM.Device, observer_identifying_attributes=observer
    )
    planes = {one.plane for one in finding.planes.values()}
    evidence = [source for plane in sorted(planes) for source in origin.sources(plane)]
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=context),
        procedure_reported=codes.LN.MRIUnspecifiedBodyRegion,
        imaging_measurements=[measured(finding, origin)],
        title=codes.DCM.ImagingMeasurementReport,
    )
    use = f", {MODEL}, {BURNT_IN.lower()}"
    report = sr.EnhancedSR(
        evidence=list({source.SOPInstanceUID: source for source in evidence}.values()),
        content=content[0],
        series_instance_uid=origin.uid("report", finding.task),
        series_number=origin.series_number(finding.task, REPORT_NUMBER),
        sop_instance_uid=origin.uid("report", finding.task, 1),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name=MODEL,
        software_versions=git_sha(),
        series_description=f"{origin.title(finding.task)[: LO - len(use)]}{use}",
        is_complete=True,
    )
    return of_study(report, origin.study)


def probability_code(name):
    """Our code of a plane's or of joined planes' probability, 16 characters at most: prob-axi,
    prob-sag-t1; a hash where that is too long."""
    parts = (re.sub(r"^(...)[a-z]*", r"\1", plane) for plane in name.split("+"))
    return short_code(f"prob-{'+'.join(parts)}", "prob-", name)


def short_code(code, start, name):
    """A code value of `name` (SH, 16 characters at most): `code`, else `start` and a hash."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return code if len(code) <= 16 else f"{start}{digest[: 16 - len(start)]}"


def redact(warning):
    """A warning about an exam without paths and descriptions, which may say whose it is."""
    if named := re.match(r"([a-z0-9-]+: )?(passed over|left out)\b", warning):
        return f"{named[0]} a series"
    text = re.sub(r"(series [0-9?]+) '.*'(?=: | is |$)", r"\1", warning)
    return "a file cannot be used" if re.search(r"[/\\]", text) else text


def measured(finding, origin):
    """What one task's networks say, as a group of measurements (TID 1501)."""
    task, decision, side = finding.task, finding.decision, origin.side
    laterality = {"L": codes.SCT.Left, "R": codes.SCT.Right}.get(side)
    numbers = [
        (sr.CodedConcept(probability_code(name), SCHEME, f"Probability, {name}"[:64]), value)
        for name, value in finding.probabilities.items()
    ]
    if decision:
        numbers += [
            (codes.DCM.Probability, decision.probability),
            (codes.DCM.ThresholdValue, decision.threshold),
        ]
    algorithm = f"{MODEL} {task}, {NOTICE}"
    if finding.models.is_synthetic:
        algorithm += f" {SYNTHETIC_ONLY}"
    fewer = finding.decided_from  # than the planes whose probabilities are given
    parameters = [f"Decided from {fewer} alone"] if fewer else []
    if finding.unusable:  # what the reasons quote may name folders
        parameters.append(f"Scanned, but not usable: {', '.join(sorted(finding.unusable))}")
    parameters += [f"Warning: {redact(text)}" for text in [*origin.warnings, *finding.warnings]]
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(
            uid=origin.uid("finding", task), identifier=f"{task}, {BURNT_IN.lower()}"
        ),
        finding_type=sr.CodedConcept(short_code(task, "task-", task), SCHEME, task[:64]),
        finding_sites=[sr.FindingSite(codes.SCT.Knee, laterality=laterality)],
        algorithm_id=sr.AlgorithmIdentification(
            algorithm, finding.models.digest, parameters or None
        ),
        measurements=[
            sr.Measurement(name, round(value, 6), codes.UCUM.NoUnits) for name, value in numbers
        ],
        qualitative_evaluations=[
            sr.QualitativeEvaluation(
                sr.CodedConcept("decision", SCHEME, "Decision at the threshold"),
                sr.CodedConcept(decision.label, SCHEME, decision.label.capitalize()),
            )
        ]
        if decision
        else None,
    )
