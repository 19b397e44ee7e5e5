/* Takes part in a pager's memory, written from docs/sharing.md alone.
 *
 * sharing DOOR: asks for page 0 by the fault queue and waits for it, touches page
 * 1, has the kernel write into page 2, then prints the first word of each page.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define PAGE 4096
#define CELLS 256
#define LAPS (1 << 20)

struct frame {
    char magic[4];
    uint16_t version, kind;
    uint32_t len, zero;
};

struct region {
    uint64_t gpa, len, offset, page_size, memfd;
};

static void die(const char *what)
{
    fprintf(stderr, "sharing: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void say(int socket, int kind, const void *body, uint32_t len, int fd)
{
    struct frame frame = {.magic = "VMPA", .version = 1, .kind = kind, .len = len};
    struct iovec parts[] = {{&frame, sizeof frame}, {(void *)body, len}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    char control[CMSG_SPACE(sizeof fd)] = {0};
    if (fd >= 0) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    if (sendmsg(socket, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof frame + len))
        die("sending");
}

/* Receives a frame of a kind; returns its length, and descriptors. */
static uint32_t hear(int socket, int kind, void *body, uint32_t room, int *fds, int *count)
{
    struct frame frame;
    struct iovec part = {&frame, sizeof frame};
    char control[CMSG_SPACE(16 * sizeof(int))];
    struct msghdr message = {&(struct sockaddr){0}, 0, &part, 1, control, sizeof control, 0};
    message.msg_name = NULL;
    if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != sizeof frame)
        die("receiving");
    if (memcmp(frame.magic, "VMPA", 4) || frame.version != 1 || frame.len > room)
        die("an answer that is none");
    for (uint32_t done = 0; done < frame.len;) {
        ssize_t n = recv(socket, (char *)body + done, frame.len - done, 0);
        if (n <= 0)
            die("receiving");
        done += n;
    }
    if (frame.kind != kind) {
        fprintf(stderr, "sharing: %.*s\n", (int)frame.len, (char *)body);
        exit(1);
    }
    *count = 0;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_type == SCM_RIGHTS) {
        *count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(fds, CMSG_DATA(header), *count * sizeof(int));
    }
    return frame.len;
}

static uint64_t *map_words(int fd, int prot)
{
    struct stat stat;
    if (fstat(fd, &stat) || !(fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK))
        die("a memfd that can shrink");
    void *words = mmap(NULL, stat.st_size, prot, MAP_SHARED, fd, 0);
    if (words == MAP_FAILED)
        die("mapping words");
    return words;
}

static int is_absent(const uint64_t *map, uint64_t page)
{
    return __atomic_load_n(&map[map[3] + page / 64], __ATOMIC_ACQUIRE) >> page % 64 & 1;
}

static uint64_t lap_of(uint64_t position) { return position / CELLS % LAPS; }

static uint64_t lap_in(uint64_t cell) { return cell >> 8 & (LAPS - 1); }

static int is_over(uint64_t cell, uint64_t position)
{
    return lap_in(cell) == (lap_of(position) + 1) % LAPS;
}

static int swap(uint64_t *word, uint64_t from, uint64_t to)
{
    return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Asks for a page; returns the position it is queued at, or -1 if full. */
static int64_t ask(uint64_t *queue, int bell, uint64_t gfn)
{
    uint64_t *cells = queue + 8;
again:
    if (queue[3] % 2 == 0)
        die("the queue is disabled");
    uint64_t head = __atomic_load_n(&queue[4], __ATOMIC_SEQ_CST);
    while (is_over(__atomic_load_n(&cells[head % CELLS], __ATOMIC_SEQ_CST), head)) {
        swap(&queue[4], head, head + 1);
        head = __atomic_load_n(&queue[4], __ATOMIC_SEQ_CST);
    }
    for (uint64_t at = head; at < head + CELLS;) {
        uint64_t *cell = &cells[at % CELLS], seen = __atomic_load_n(cell, __ATOMIC_SEQ_CST);
        if (is_over(seen, at)) {
            at++;
        } else if (lap_in(seen) != lap_of(at)) {
            goto again;
        } else if ((seen & 3) == 0) {
            if (!swap(cell, seen, 1 | lap_of(at) << 8 | gfn << 28))
                continue;
            seen = 1;
            uint64_t one = 1;
            if (write(bell, &one, sizeof one) < 0 && errno != EAGAIN)
                die("the eventfd");
            return at;
        } else if (seen >> 28 == gfn) {
            uint64_t one = 1;
            if ((seen & 3) == 1 && write(bell, &one, sizeof one) < 0 && errno != EAGAIN)
                die("the eventfd");
            return at;
        } else {
            at++;
        }
    }
    return -1;
}

static void wait_for(const uint64_t *map, uint64_t *queue, int bell, uint64_t page, uint64_t gfn)
{
    while (is_absent(map, page)) {
        int64_t at = ask(queue, bell, gfn);
        if (at < 0) {
            usleep(1000);
            continue;
        }
        uint64_t *cell = &queue[8 + at % CELLS], *waiters = cell + CELLS, counted;
        do {
            counted = __atomic_load_n(waiters, __ATOMIC_SEQ_CST);
        } while (!swap(waiters, counted,
                       counted >> 32 == lap_of(at) ? counted + 1 : lap_of(at) << 32 | 1));
        for (;;) {
            uint64_t seen = __atomic_load_n(cell, __ATOMIC_SEQ_CST);
            if (is_over(seen, at) || !is_absent(map, page))
                break;
            syscall(SYS_futex, cell, FUTEX_WAIT, (uint32_t)seen, NULL, NULL, 0);
        }
        do {
            counted = __atomic_load_n(waiters, __ATOMIC_SEQ_CST);
        } while (counted >> 32 == lap_of(at) && (uint32_t)counted &&
                 !swap(waiters, counted, counted - 1));
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int door = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), fds[16], count;
    if (argc != 2)
        die("usage: sharing DOOR");
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    if (connect(door, (struct sockaddr *)&address, sizeof address))
        die("connecting");

    struct region regions[126];
    say(door, 1, NULL, 0, -1);
    uint32_t len = hear(door, 2, regions, sizeof regions, fds, &count);
    if (len < sizeof regions[0] || count < 4)
        die("no memory");
    uint64_t *map = map_words(fds[0], PROT_READ);
    uint64_t *queue = map_words(fds[1], PROT_READ | PROT_WRITE);
    if (memcmp(map, "VMPGMAP", 8) || map[1] != 2 || memcmp(queue, "VMPGFLT", 8) || queue[1] != 1)
        die("another version");

    char *memory = mmap(NULL, regions[0].len, PROT_READ | PROT_WRITE, MAP_SHARED,
                        fds[3 + regions[0].memfd], regions[0].offset);
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_REMOVE};
    struct uffdio_register range = {{(uintptr_t)memory, regions[0].len},
                                    UFFDIO_REGISTER_MODE_MISSING, 0};
    if (memory == MAP_FAILED || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) ||
        ioctl(uffd, UFFDIO_REGISTER, &range))
        die("a userfaultfd");
    uint64_t at = (uintptr_t)memory;
    say(door, 3, &at, sizeof at, uffd);
    hear(door, 4, regions + 1, sizeof regions - sizeof regions[0], fds + 8, &count);

    wait_for(map, queue, fds[2], map[9], map[8] / PAGE);
    *(volatile char *)(memory + PAGE);
    int ends[2];
    if (pipe(ends) || write(ends[1], "C", 1) != 1 || read(ends[0], memory + 3 * PAGE - 1, 1) != 1)
        die("having the kernel write");
    for (int page = 0; page < 3; page++) {
        /* A touch may return a moment before the bit is cleared. */
        for (int ms = 0; is_absent(map, page); ms++) {
            if (ms == 10000)
                die("a page that is here is absent");
            usleep(1000);
        }
        printf("%llu\n", (unsigned long long)*(volatile uint64_t *)(memory + page * PAGE));
    }
    return 0;
}
