#!/usr/bin/env bash
# Set up and run the tests: without arguments all but the slow ones. Arguments go to pytest.
#
#   launch/test.sh                       # twelve minutes on two cores of an AMD EPYC
#   launch/test.sh -m '' tests/test_readme.py    # one file, its slow ones too
#   launch/test.sh -k order -x
#
# The tests of the Slurm launcher need Slurm and root (apt-get install slurm-wlm munge slurmctld slurmd); without, they skip.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
launch/setup.sh all
where=(tests)
for argument; do
    [[ ! -e ${argument%%::*} ]] || where=()
done
(($#)) || set -- --numprocesses 3 --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest -m 'not slow' "${where[@]}" "$@"
