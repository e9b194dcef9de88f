"""Airflow DAG: submit the nightly job to a Ray cluster, wait, and act on its exit code.

`ray job submit` itself exits with 0 or 1 only; the job's own code is in `driver_exit_code`. The DAG needs Airflow 3
and, in its environment, `ray[default]` of the cluster's version. RAY_ADDRESS is the dashboard (`http://head:8265`), and
the token comes from RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token.
"""

import os
import time
from datetime import datetime, timedelta

from airflow.exceptions import AirflowException, AirflowFailException
from airflow.sdk import dag, task

# The image of the cluster holds the jobs. They serve the newest day in the log, whatever the clock says.
ENTRYPOINT = (
    "python /app/jobs/nightly_candidates.py --config /app/conf/nightly.yaml --set root=s3://my-bucket/nightrails"
)
POLL_SECONDS = 30

PAGE = {
    1: "a fault of nightrails; please report it",
    10: "a quality gate said no; yesterday's table stays",
    20: "bad input or configuration; a retry cannot help",
}
RETRY = {
    30: "the infrastructure failed; the retry resumes",
    40: "another run has published meanwhile",
}


@dag(schedule="30 2 * * *", start_date=datetime(2026, 1, 1), catchup=False, max_active_runs=1, tags=["nightrails"])
def nightrails() -> None:
    @task(retries=4, retry_delay=timedelta(minutes=15), execution_timeout=timedelta(hours=13))
    def nightly_candidates(run_id=None, ti=None) -> None:  # Airflow fills in both, and wants None as their default
        from ray.job_submission import JobSubmissionClient

        client = JobSubmissionClient(os.environ["RAY_ADDRESS"])
        job = submit_or_attach(client, submission_prefix(run_id), ti.try_number)
        while not client.get_job_status(job).is_terminal():
            time.sleep(POLL_SECONDS)
        judge(client.get_job_info(job).driver_exit_code, last_lines(client, job))

    nightly_candidates()


def submission_prefix(run_id: str) -> str:
    """The part of the submission id that all tries of one DAG run share."""
    return "nightrails-" + "".join(letter if letter.isalnum() else "-" for letter in run_id)


def submit_or_attach(client, prefix: str, try_number: int) -> str:
    """Find the job of an earlier try that is still running (its Airflow worker died), else submit a new job."""
    for job in client.list_jobs():
        if (job.submission_id or "").startswith(f"{prefix}-try") and not job.status.is_terminal():
            return job.submission_id
    return client.submit_job(entrypoint=ENTRYPOINT, submission_id=f"{prefix}-try{try_number}")


def last_lines(client, job: str) -> str:
    """Read the end of the job's log: the error in one sentence, and the JSON line."""
    return "\n".join(client.get_job_logs(job).splitlines()[-5:])


def judge(exit_code: int | None, log: str) -> None:
    """Succeed on 0; fail for good on 1, 10 and 20, so that a person is called; let Airflow retry on everything else."""
    if exit_code == 0:
        return
    if exit_code in PAGE:
        raise AirflowFailException(f"exit code {exit_code}: {PAGE[exit_code]}\n{log}")
    reason = RETRY.get(exit_code, "the driver was killed or stopped")
    raise AirflowException(f"exit code {exit_code}: {reason}\n{log}")


nightrails()
