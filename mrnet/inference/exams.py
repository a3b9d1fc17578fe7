"""The exams that a user names on the command line: a data folder, an exam's files, or DICOM.

    from mrnet.inference.exams import open_exams
    with open_exams([Path("scans")]) as exams:
        for exam in exams.each():
            print(exam.name, exam.source, exam.paths)  # {"axial": Path, ...}, the planes there are

predict.py and explain.py take exams without labels, which dataloader.py's data sets do not have.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mrnet.errors import InputError, printable
from mrnet.files import ROOT, open_regular, open_zip
from mrnet.layout.description import contrast, read_dataset
from mrnet.layout.planes import (
    ALL_PLANES,
    ORIENTATION,
    PLANES,
    SEQUENCES,
    T1_PLANES,
    in_order,
    view_of,
)
from mrnet.layout.volumes import read_volume
from mrnet.scans.files import is_dicom
from mrnet.scans.importer import Importer

# What the importer makes of any scan.
FROM_DICOM = {"name": "DICOM", "version": "", "synthetic": False, "orientation": ORIENTATION}
# Of dataset.json: what importers do on request.
PREPARATION = ("mirrored", "field_of_view", "square")
UNKNOWN_CONTRAST = (
    "note: nothing tells on which series these networks were trained (no dataset.json); "
    "fluid-sensitive ones are taken, where MRNet's coronal series are T1 (data/README.md)"
)
WARNINGS, LONGEST = 3, 200  # of an exam that a row repeats, and characters of each
SCAN_IN_ZIP = re.compile(r"(\.dcm|\.nii(\.gz)?|(^|/)[^./]+)$", re.IGNORECASE)
NO_SCANS = (".npy", ".csv", ".json")  # of a data folder, which need not be opened
NAME_WITH_SIDE = re.compile("[0-9a-f]{16}-([LR])")  # of mrnet.scans.register.exam_name
DATASET_ABOVE = 3  # folders above a volume's in which dataset.json is looked for


class Exam(NamedTuple):
    """One exam's volumes on disk."""

    name: str  # stable: file name without .npy, or hash of the study with the knee's side
    source: str  # folder that it was found in, relative to what the user named; "" for that itself
    paths: dict  # plane -> Path, of the planes that are there
    unusable: dict  # plane -> why, of those that were there, or may have been, and cannot be used
    input: str  # hash of the files that it is made of
    unchanged: bool = False  # `input` is the one that was known, and nothing was converted
    origin: dict | str | None = None  # as mrnet/scans/origin.py describes it, or why not, if asked
    warnings: tuple = ()  # of what was used all the same, such as the second best series

    @property
    def key(self):
        return self.source, self.name

    @property
    def side(self):
        """The knee's: L, R or "" where it is not known, by its origin or an importer's name."""
        if isinstance(self.origin, dict):
            return self.origin["side"]
        named = NAME_WITH_SIDE.fullmatch(self.name)
        return named[1] if named else ""


class FolderExams:
    """The exams under `root` in MRNet's layout: <root>/<any folders>/<plane>/<exam>.npy.

    Keeps their names only: 100,000 exams take some 10 MB.
    """

    failed, fault = 0, None  # as DicomExams has them

    def __init__(self, root):
        self.root, self.names, self.planes = Path(root), {}, {}  # of each folder, of each source
        for folder in plane_folders(root):
            self.names[folder] = exam_names(folder)
            self.planes[self.source_of(folder)] = planes_below(folder)

    def __len__(self):
        return sum(len(names) for names in self.names.values())

    def __iter__(self):
        """(source, name) of each exam, in order."""
        for folder, names in self.names.items():
            for name in names:
                yield self.source_of(folder), name

    def source_of(self, folder):
        """A folder of plane folders, relative to the root; "" for that itself."""
        source = folder.relative_to(self.root).as_posix()
        return "" if source == "." else source

    @property
    def shown(self):
        """The planes that there are volumes of, set."""
        return {plane for found in self.planes.values() for plane in found}

    @property
    def datasets(self):
        """What the exams are: dataset.json's content of each folder, None where there is none."""
        return [dataset_of(folder) for folder in self.names]

    def ask_origin(self):
        """Have each Exam say where it comes from.

        Raises:
            InputError: these are .npy files, which do not know it.
        """
        raise InputError(f"{self.root}: .npy files belong to no DICOM study; leave out --dicom")

    def keep_split(self, split):
        """Leave only the exams of one of SPLITS, where there are some."""
        if ours := {folder: n for folder, n in self.names.items() if folder.name == split}:
            self.names = ours

    def load(self, key, unless=None):
        """The Exam of a (source, name); unchanged if its `input` is `unless`."""
        source, name = key
        folder = self.root / source
        paths = {plane: folder / plane / f"{name}.npy" for plane in self.planes[source]}
        return exam_of(name, source, {p: f for p, f in paths.items() if os.path.lexists(f)}, unless)

    def each(self, known=None):
        """Every Exam in order.

        Args:
            known: {(source, name): input} of exams that need not be converted if they have not
                changed.
        """
        for key in self:
            yield self.load(key, (known or {}).get(key))

    def remove(self, exam):
        """Remove what was converted of an Exam: here nothing was."""


class FilesExam(FolderExams):
    """One exam, of one .npy file a plane."""

    names = {}  # no folder of plane folders

    def __init__(self, paths, plane=None):
        self.name, self.paths = exam_of_files(paths, plane)
        self.root = paths[0]

    def __len__(self):
        return 1

    def __iter__(self):
        yield "", self.name

    @property
    def shown(self):
        return {*self.paths}

    @property
    def datasets(self):
        return [dataset_of(path.absolute().parent) for path in self.paths.values()]

    def load(self, key, unless=None):
        return exam_of(self.name, "", self.paths, unless)


def exam_of(name, source, paths, unless):
    """An Exam of files as they are."""
    total = hashlib.blake2b(digest_size=8)
    for plane, path in paths.items():
        try:
            with open_regular(path) as file:
                content = hashlib.file_digest(file, "blake2b").digest()
        except OSError as error:  # reading the volume raises an InputError
            content = str(error.errno).encode()
        total.update(plane.encode() + content)
    return Exam(name, source, paths, {}, total.hexdigest(), total.hexdigest() == unless)


def dataset_of(folder):
    """The nearest dataset.json at or above a folder of plane folders, or None."""
    for place in [folder, *folder.absolute().parents][: DATASET_ABOVE + 1]:
        if (found := read_dataset(place)) is not None:
            return found
    return None


def read_planes(exam, models, read=None):
    """The volumes of an exam that a task's networks take, and what cannot be used of it.

    Args:
        models: task_models.TaskModels.
        read: {plane: volume}, what was read before; filled.

    Returns:
        {plane: uint8 array (s, H, W)} in the order of ALL_PLANES, {plane: why not}.
    """
    read = {} if read is None else read
    volumes, unusable = {}, {p: why for p, why in exam.unusable.items() if p in models.planes}
    for plane in models.planes:
        if plane in exam.paths:
            try:
                if plane not in read:
                    read[plane] = read_volume(exam.paths[plane])
                models.check_volume(exam.paths[plane], read[plane], plane)
                volumes[plane] = read[plane]
            except InputError as error:
                unusable[plane] = str(error)
    return volumes, unusable


def refuse_unfit(models, datasets, allow_synthetic, shown):
    """Refuse exams that the networks of a task have no answer for.

    Args:
        models: task_models.TaskModels.
        datasets: what the exams are, as `FolderExams.datasets`.
        shown: planes that there are volumes of, container.

    Raises:
        InputError: the networks were trained on synthetic exams and these are not, or these lie in
            another orientation, or are not mirrored or cut as theirs were.
    """
    real = any(dataset is None or not dataset["synthetic"] for dataset in datasets)
    if models.is_synthetic and real and not allow_synthetic:
        names = ", ".join(d["name"] for d in models.datasets if d is not None and d["synthetic"])
        raise InputError(
            f"the {models.task} networks were trained on synthetic exams ({names}), so their "
            "answer says nothing about a patient; give --models-dir with networks that were "
            "trained on real exams, or try the command all the same with --allow-synthetic"
        )
    for trained_on in models.datasets:
        for given in datasets:
            check_preparation(models.task, trained_on or {}, given)
            check_contrast(models, trained_on, given, shown)
            for plane in dict.fromkeys(map(view_of, models.planes)):
                mine = ((trained_on or {}).get("orientation") or {}).get(plane)
                theirs = ((given or {}).get("orientation") or {}).get(plane)
                if mine and theirs and mine != theirs:
                    raise InputError(
                        f"{plane} orientation of {given['name']} is {theirs} (directions in which "
                        f"slices, rows and columns increase), the {models.task} networks were "
                        f"trained on {mine}; reorient the volumes and correct dataset.json"
                    )


def check_preparation(task, trained_on, given):
    """Refuse exams that are not mirrored or cut as those that a task's networks were trained on.

    Args:
        trained_on, given: content of dataset.json; `given` None where it is not known.
    """
    for name in PREPARATION:
        mine, theirs = (trained_on.get(name) or None), ((given or {}).get(name) or None)
        if given is not None and mine != theirs:
            raise InputError(
                f"{given['name']} has {name} {theirs}, the {task} networks were trained on {name} "
                f"{mine}; prepare the exams as those were (data/rsna/prepare.py --help)"
            )


def check_contrast(models, trained_on, given, shown):
    """Refuse exams with T1 series in a plane whose networks learnt from fluid-sensitive ones, or
    the other way round.

    Args:
        models: task_models.TaskModels.
        trained_on, given: content of dataset.json, None where it is not known.
        shown: planes that there are volumes of.
    """
    if trained_on is None or given is None:
        return
    for plane in set(models.planes) & set(PLANES) & set(shown):
        mine, theirs = contrast(trained_on, plane), contrast(given, plane)
        if mine != theirs:
            raise InputError(
                f"{given['name']}: its {plane} series are {theirs}, the {models.task} networks "
                f"were trained on {mine} ones ({trained_on['name']}); leave that plane out, or "
                f"prepare the exams from DICOM with{'' if mine == 'T1' else 'out'} --t1-plane "
                f"{plane} (data/dicom/prepare.py)"
            )


class DicomExams:
    """Exams under `source` that importers convert one by one, into `folder`: data/rsna's where the
    series' CSV lies beside it as in RSNA's set, else data/dicom's.

    While one exam is predicted the next is converted, by each of the importers one.

    Args:
        log: prints the importers' messages.
        preparation: as `importer_preparation` returns it.
        workers: importers side by side. Each of data/dicom's reads all headers first.
    """

    def __init__(self, source, folder, log, preparation, workers=1):
        self.source, self.folder, self.log = source, Path(folder), log
        self.shown = set(PLANES)  # any of them, as far as is known yet
        self.wants_origin = False  # each exam shall say where it comes from
        importer = "rsna" if is_rsna(source) else "dicom"
        if importer == "dicom" and source.name.endswith("_series"):  # as RSNA's folders are called
            words = (
                f"warning: {source}.csv: no list of series, so {source.name} is read as any DICOM "
            )
            self.print_lines([("stderr", f"{words}(data/dicom/prepare.py), not as RSNA's set")])
        if importer == "rsna":  # which pads, so networks of cropped slices refuse its exams
            preparation = {name: v for name, v in preparation.items() if name != "square"}
        self.datasets = [FROM_DICOM | preparation]
        options = ["--mirror" if preparation.get("mirrored") else "--no-mirror"]
        if preparation.get("field_of_view"):
            options += ["--field-of-view", str(preparation["field_of_view"])]
        options += ["--square", preparation["square"]] if preparation.get("square") else []
        options += ["--t1"] if preparation.get("t1") else []
        options += [f"--t1-plane={plane}" for plane in preparation.get("t1_planes", ())]
        script = ROOT / "data" / importer / "prepare.py"
        self.importers = [Importer(script, source, folder, options) for _ in range(workers)]
        for one in self.importers:  # they read the headers side by side
            one.read_listing()
            if "exams" not in one.listing:
                self.print_lines(one.listing.get("lines", ()))
                self.close()
                raise InputError(self.fault)
        first = self.importers[0].listing
        self.print_lines(first["lines"])
        self.failed = sum(text.startswith("error: ") for _, text in first["lines"])
        self.listed = [(where, name) for name, where in first["exams"]]
        self.place = {key: place for place, key in enumerate(self.listed)}

    def __len__(self):
        return len(self.listed)

    def __iter__(self):
        return iter(self.listed)

    @property
    def fault(self):
        """Why exams could not be converted at all, such as a full disk, or None."""
        return next((one.fault for one in self.importers if one.fault), None)

    def ask_origin(self):
        """Have each Exam say where it comes from."""
        self.wants_origin = True

    def print_lines(self, lines):
        for stream, text in lines:
            print(text, file=sys.stderr) if stream == "stderr" else self.log(text)

    def importer_of(self, key):
        return self.importers[self.place[key] % len(self.importers)]

    def request(self, key, unless=None):
        self.importer_of(key).request(key[1], unless, self.wants_origin)

    def answer(self, key):
        """The importer's answer to `request` as an Exam."""
        source, name = key
        importer = self.importer_of(key)
        reply = importer.answer()
        lines = reply.get("lines", ())
        if "exam" not in reply:
            self.print_lines(lines)
            why = reply.get("crash") or importer.fault
            return Exam(name, source, {}, dict.fromkeys(ALL_PLANES, why), "")
        # predict.py and explain.py print the exam's own error
        self.print_lines(one for one in lines if not one[1].startswith("error: "))
        if "planes" not in reply:
            return Exam(name, source, {}, {}, reply["input"], unchanged=True)
        if reply["fault"]:
            importer.fault = reply["fault"]
            return Exam(name, source, {}, dict.fromkeys(ALL_PLANES, importer.fault), reply["input"])
        paths = {plane: Path(reply["planes"][plane]) for plane in in_order(reply["planes"])}
        about = {"origin": reply["origin"], "warnings": warnings_in(lines, *key)}
        return Exam(name, source, paths, reply["unusable"], reply["input"], **about)

    def load(self, key):
        """The Exam of a (source, name), converted."""
        self.request(key)
        return self.answer(key)

    def each(self, known=None):
        """Every Exam in order, there until `remove`; `known` as in FolderExams."""
        ahead = len(self.importers)
        for i, key in enumerate(self.listed):
            for later in self.listed[i + ahead * (i > 0) : i + ahead + 1]:
                self.request(later, (known or {}).get(later))
            yield self.answer(key)

    def remove(self, exam):
        """Remove what was converted of an Exam."""
        shutil.rmtree(self.folder / exam.name, ignore_errors=True)

    def close(self):
        for importer in self.importers:
            importer.close()


def warnings_in(lines, source, name):
    """What an importer warned of in one exam, without the exam's name, which rows have already: at
    most WARNINGS texts, and how many more there were.

    Args:
        lines: as `serve` answers them.
        source, name: of the exam.
    """
    found = []
    for _, text in lines:
        if text.startswith("warning: "):
            text = text.removeprefix("warning: ")
            for title in (f"{name} ({source}): ", f"study {source}: "):  # data/dicom's, data/rsna's
                text = text.removeprefix(printable(title))
            found.append(text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")
    more = [f"{len(found) - WARNINGS} more warnings"] if len(found) > WARNINGS else []
    return *found[:WARNINGS], *more


def is_rsna(source):
    """Whether a folder is RSNA's knee set's: a CSV of its name and of its series lies beside it."""
    try:
        path = source.with_name(f"{source.name}.csv")
        with open_regular(path, "r", encoding="utf-8-sig") as file:
            head = file.readline(1000)
    except (OSError, ValueError):
        return False
    return source.is_dir() and "seriesinstanceuid" in head.casefold()


def plane_folders(root):
    """Folders at or below `root` with a folder of ALL_PLANES, links followed once."""
    seen = set()
    for folder, below, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        below[:] = sorted(name for name in below if real not in seen and not name.startswith("."))
        seen.add(real)
        if in_order(below):
            yield Path(folder)
            below[:] = [name for name in below if name not in ALL_PLANES]


def planes_below(folder):
    """The planes that a folder has a folder of."""
    return [plane for plane in ALL_PLANES if (folder / plane).is_dir()]


def refuse_scans_beside(exams):
    """Refuse a folder of .npy exams that holds scans as well: they would be left out in silence.

    Looks at names, and into the first bytes of files that have none that tells; not into the
    folders of .npy files.

    Args:
        exams: FolderExams with at least one exam.

    Raises:
        InputError: names the first scan.
    """
    of_exams = [folder / plane for folder, names in exams.names.items() if names
                for plane in planes_below(folder)]  # fmt: skip
    known, seen = set(map(os.path.realpath, of_exams)), set()
    for folder, below, files in os.walk(exams.root, followlinks=True):
        seen.add(os.path.realpath(folder))
        below[:] = sorted(
            name
            for name in below
            if name[0] != "." and os.path.realpath(f"{folder}/{name}") not in known | seen
        )
        found = (Path(folder, name) for name in sorted(files) if name[0] != ".")
        if path := next(filter(is_scan, found), None):
            raise InputError(
                f"{path}: a scan beside {of_exams[0]} with .npy exams, and only one kind can be "
                "read at a time; give the folder of either alone, or move one of them elsewhere"
            )


def is_scan(path):
    """Whether a file is DICOM, NIfTI, or a zip that seems to hold such, by its members' names."""
    name = path.name.lower()
    if name.endswith((".dcm", ".nii", ".nii.gz")):
        return True
    try:
        if name.endswith(".zip"):
            with open_regular(path, most=None) as file, open_zip(file) as archive:
                return any(map(SCAN_IN_ZIP.search, archive.namelist()))
        if name.endswith(NO_SCANS) or not path.is_file():
            return False
        with open_regular(path, most=None) as file:
            return is_dicom(file.read(132))
    except Exception:  # a broken link, a damaged zip: nobody can tell, and none is read
        return False


def exam_names(folder):
    """Names of the exams that have a volume of at least one plane, sorted."""
    names = set()
    for plane in planes_below(folder):
        files = (file.name for file in os.scandir(folder / plane))
        # Names that start with a dot are half-written files, or macOS's resource forks.
        names |= {f[: -len(".npy")] for f in files if f.endswith(".npy") and f[0] != "."}
    return sorted(names)


def importer_preparation(networks):
    """How the importer must mirror and cut exams: as those that networks were trained on.

    Args:
        networks: list of task_models.TaskModels.

    Returns:
        PREPARATION, "t1_planes" and "t1" as far as they are not the default; where networks differ
        in one of the first, that of the first (`refuse_unfit` refuses the others).
    """
    datasets = (dataset for models in networks for dataset in models.datasets)
    first = next((found for found in datasets if found is not None), {})
    t1 = {"t1": True} if any(p in T1_PLANES for models in networks for p in models.planes) else {}
    names = (*PREPARATION, "t1_planes")
    return {name: first[name] for name in names if first.get(name)} | t1


@contextmanager
def open_exams(sources, plane=None, log=print, networks=None, workers=1):
    """The exams that a user names on the command line.

    Args:
        sources: list of one Path, a folder in MRNet's layout, or a folder or zip of DICOM or NIfTI;
            or the .npy files of one exam, one a plane.
        plane: of a single .npy file, where its path does not contain it.
        log: prints the DICOM importer's messages about its choice of series.
        networks: list of task_models.TaskModels that will see them: scans are mirrored and cut as
            the exams were that they were trained on, and further series are taken if they take
            them.
        workers: processes that convert scans.

    Yields:
        FolderExams, FilesExam or DicomExams. What was converted lies in a temporary folder, gone
        when the context ends.

    Raises:
        InputError: nothing there, or nothing that can be used.
    """
    check_there(sources)
    if all(source.suffix == ".npy" for source in sources):
        yield FilesExam(sources, plane)
        return
    source = sources[0]
    if len(sources) > 1:
        raise InputError(f"{source}: give one folder or zip, or the .npy files of one exam")
    if plane:
        raise InputError(f"{source}: --plane is for a single .npy file; leave it out")
    exams = FolderExams(source)
    if len(exams):
        refuse_scans_beside(exams)
        yield exams
        return
    if source.is_dir() and any(source.glob("*.npy")):
        raise InputError(
            f"{source}: its .npy files lie in no folder axial, coronal or sagittal; give the "
            "folder above these, or the files of one exam"
        )
    trained_on = [one for models in networks or () for one in models.datasets]
    if trained_on and not any(trained_on):
        log(UNKNOWN_CONTRAST)
    with tempfile.TemporaryDirectory(prefix="mrnet-") as folder:
        exams = DicomExams(source, folder, log, importer_preparation(networks or ()), workers)
        try:
            yield exams
        finally:
            exams.close()


def check_there(sources):
    """Raise InputError where a file or folder that a user names is not there."""
    for source in sources:
        if not source.exists():
            raise InputError(f"{source}: no such file or folder; give an exam or a data folder")


def planes_in(name):
    """The planes that a file's name holds: list; empty where it names a sequence but not behind its
    plane, as a T1 must not pass for a fluid-sensitive series."""
    planes = [plane for plane in PLANES if plane in name]
    sequences = [word for word in re.split("[^a-z0-9]+", name) if word in SEQUENCES]
    if not sequences:
        return planes
    further = [f"{plane}-{word}" for plane in planes for word in sequences]
    return [plane for plane in further if re.search(rf"{plane}(?![a-z0-9])", name)]


def plane_of_file(path, plane=None):
    """The plane of a .npy file: `plane`, else its folder's name, else part of its own.

    Raises:
        InputError: nothing tells it, or two of these are of different views.
    """
    named = planes_in(path.stem.lower())
    told = [plane, path.absolute().parent.name, *(named if len(named) == 1 else ())]
    told = [one for one in told if one in ALL_PLANES]
    if len({view_of(one) for one in told}) == 1:
        return told[0]
    if told:
        raise InputError(
            f"{path}: {' or '.join(in_order(told))}? Its name, its folder and --plane contradict "
            "each other; rename it"
        )
    raise InputError(
        f"{path}: which plane is it? Name it axial.npy, coronal.npy or sagittal.npy, put it into "
        "such a folder, or give --plane"
    )


def exam_of_files(paths, plane=None):
    """The name of the exam that .npy files make, one a plane, and {plane: Path}.

    A file's plane is `plane`, or its folder's name, or part of its own name; the exam's name is
    the rest of it ("knee7-axial.npy" is knee7), or the folder's where nothing is left.
    """
    if plane and len(paths) > 1:
        raise InputError(f"{paths[0]}: --plane is for a single .npy file; leave it out")
    found, names, homes = {}, {}, {}
    for path in paths:
        home = path.absolute().parent
        where, name, folder = plane_of_file(path, plane), path.stem, home.name
        if plane or folder in ALL_PLANES:
            home = home.parent
        else:
            name = re.sub(f"[ ._-]*{where}", "", name, flags=re.I).strip(" ._-") or folder
        homes[home] = path
        if where in found:
            raise InputError(f"{path}: a second {where} volume; give one file per plane")
        found[where], names[name] = path, path
    if len(names) > 1 or len(homes) > 1:
        names = names if len(names) > 1 else map(str, homes.values())
        raise InputError(
            f"{paths[-1]}: not of the same exam as the others ({', '.join(names)}); give the files "
            "of one exam, named alike"
        )
    return *names, {plane: found[plane] for plane in in_order(found)}
