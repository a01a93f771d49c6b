/* Events of an OpenCL device that are recorded again and again: OpenCL makes a new object at each
 * recording, so each of ours is a box for the last one. Plain C11 without Python.
 */
#ifndef DRIVETRAIN_OPENCL_EVENT_H
#define DRIVETRAIN_OPENCL_EVENT_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct dt_cl_event dt_cl_event;

/* An event that was never recorded. The addresses are those of clEnqueueMarkerWithWaitList,
 * clRetainEvent and clReleaseEvent. NULL: no memory. */
dt_cl_event *dt_cl_event_new(uintptr_t marker, uintptr_t retain, uintptr_t release);
void dt_cl_event_free(dt_cl_event *event);

/* Record at the end of what is queued; OpenCL's own code, 0 for success. */
int dt_cl_event_record(void *event, void *queue);

/* The cl_event of the last recording, retained for the caller; NULL: never recorded. *queue is the
 * queue it was recorded on when nobody has asked since, so that it may have to be flushed. */
void *dt_cl_event_take(dt_cl_event *event, void **queue);

#ifdef __cplusplus
}
#endif

#endif
