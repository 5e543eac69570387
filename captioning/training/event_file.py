"""TensorBoard's event files, which outlive a full disk: its own writer ends for good at the first error."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.writer import FileWriter

from captioning.runs.patient_files import PatientLog


class EventWriter(SummaryWriter):
    """torch's SummaryWriter, except that events which cannot be written wait in memory until they can."""

    def _get_file_writer(self) -> FileWriter:
        writer: Any = self.file_writer
        if writer is None:
            writer = _FileWriter(self.log_dir)
            both: Any = writer, {self.log_dir: writer}
            self.file_writer, self.all_writers = both
            if self.purge_step is not None:  # hides the events of an earlier start from this step on
                start = SessionLog(status=SessionLog.START)
                writer.add_event(Event(step=self.purge_step, file_version="brain.Event:2"))
                writer.add_event(Event(step=self.purge_step, session_log=start))
                self.purge_step = None
        return writer


class _FileWriter(FileWriter):
    def __init__(self, log_dir: str):
        self.event_writer: Any = _EventLog(Path(log_dir))  # instead of the one that FileWriter would start a thread for


class _EventLog:
    """What FileWriter wants of an EventFileWriter."""

    def __init__(self, folder: Path):
        self._folder = folder
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        self._log = PatientLog(folder / name)
        self._records = RecordWriter(self)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def get_logdir(self) -> str:
        return str(self._folder)

    def add_event(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def write(self, record: bytes) -> None:
        self._log.add(record)

    def flush(self) -> None:
        if not self._folder.is_dir():
            try:
                self._folder.mkdir()
            except OSError:
                return  # PatientLog would say the same
        self._log.write()

    def close(self) -> None:
        self.flush()

    def reopen(self) -> None:
        """Nothing is closed in between."""
