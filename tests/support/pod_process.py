"""Run `ovsmesh` as a container of a pod runs it: `python -m tests.support.pod_process FOLDER ARGUMENT…`.

FOLDER holds the service account's token, ca.crt and namespace; see Reach.service_account_folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ovsmesh.cli.main import main
from ovsmesh.kube import service_account

if __name__ == "__main__":
    service_account.DIRECTORY = Path(sys.argv.pop(1))
    main()
