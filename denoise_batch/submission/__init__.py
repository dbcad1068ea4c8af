"""The same command on a Ray cluster, through Ray Jobs: submit, follow, look, stop.

    check_command(command)
    cluster = reach("http://localhost:8265")
    submit(cluster, command, job_id := new_id(command), {})
    transcript = follow(cluster, job_id, progress, verbose=False)

Everything that a request can be refused for without the cluster's files is found before anything is uploaded. The
package itself goes along, so that the cluster runs this very code; what it needs must be installed there.
"""
