/* Network namespaces with a TUN device each, for programs that carry packets between them.
 *
 * No namespace has a name: they live as long as the process that made them or something inside them does, so nothing is left
 * behind however it ends. For programs of one file each: everything is static.
 */
#pragma once
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MTU 1500
#define QUEUE_LENGTH 20000
#define FIRST_NAMESPACE_FD 100

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Nothing but what is measured shall pass: no neighbour discovery of IPv6. Kernels without it have no such file. */
static void without_ipv6(void) {
    int f = open("/proc/sys/net/ipv6/conf/all/disable_ipv6", O_WRONLY);
    if (f < 0) return;
    if (write(f, "1", 1) != 1) die("switching IPv6 off in the namespace");
    close(f);
}

static void configure(const char *device, const char *address) {
    int s = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq lo = {.ifr_flags = IFF_UP}, r = {0};
    strcpy(lo.ifr_name, "lo");
    strcpy(r.ifr_name, device);
    struct sockaddr_in *in = (struct sockaddr_in *)&r.ifr_addr;
    if (s < 0 || ioctl(s, SIOCSIFFLAGS, &lo)) die("bringing up lo");
    in->sin_family = AF_INET;
    inet_pton(AF_INET, address, &in->sin_addr);
    if (ioctl(s, SIOCSIFADDR, &r)) die("giving the device its address");
    inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
    if (ioctl(s, SIOCSIFNETMASK, &r)) die("giving the device its mask");
    r.ifr_mtu = MTU;
    if (ioctl(s, SIOCSIFMTU, &r)) die("setting the MTU");
    r.ifr_qlen = QUEUE_LENGTH;
    if (ioctl(s, SIOCSIFTXQLEN, &r)) die("setting the queue length");
    r.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(s, SIOCSIFFLAGS, &r)) die("bringing up the device");
    close(s);
}

/* A new namespace with its TUN device; this process is inside it afterwards. Returns the device. */
static int make_side(const char *address, int *namespace) {
    if (unshare(CLONE_NEWNET)) die("making a network namespace (root is needed)");
    if ((*namespace = open("/proc/self/ns/net", O_RDONLY)) < 0) die("/proc/self/ns/net");
    without_ipv6();
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    if (device < 0) die("/dev/net/tun");
    struct ifreq r = {.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR};
    strcpy(r.ifr_name, "emu0");
    int header = sizeof(struct virtio_net_hdr);
    if (ioctl(device, TUNSETIFF, &r) || ioctl(device, TUNSETVNETHDRSZ, &header) ||
        ioctl(device, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4))
        die("making a TUN device");
    configure("emu0", address);
    return device;
}

/* HOSTS namespaces with their devices, the first at 10.78.0.1; their descriptors stay open under numbers from FIRST_NAMESPACE_FD on.
 * This process is where it was afterwards, and does not wait for its input. */
static void make_sides(int hosts, int *devices) {
    int home = open("/proc/self/ns/net", O_RDONLY);
    for (int i = 0; i < hosts; i++) {
        char address[32];
        snprintf(address, sizeof address, "10.78.0.%d", i + 1);
        int namespace;
        devices[i] = make_side(address, &namespace);
        if (dup2(namespace, FIRST_NAMESPACE_FD + i) < 0) die("dup2");
        close(namespace);
    }
    if (setns(home, CLONE_NEWNET)) die("coming back");
    close(home);
    fcntl(0, F_SETFL, O_NONBLOCK);
}

/* Have `command` obey the lines that have come on standard input; one that it does not know ends the program. False at the end of the
 * input. */
static bool obey(bool (*command)(const char *line)) {
    static char buffer[1 << 16];
    static size_t used;
    ssize_t n = read(0, buffer + used, sizeof buffer - 1 - used);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    if (n == 0) return false;
    used += (size_t)n;
    buffer[used] = 0;
    char *end;
    while ((end = strchr(buffer, '\n'))) {
        *end = 0;
        if (!command(buffer)) {
            fprintf(stderr, "not a command: %s\n", buffer);
            exit(2);
        }
        used -= (size_t)(end + 1 - buffer);
        memmove(buffer, end + 1, used + 1);
    }
    return true;
}

static int enter(char **arguments) {
    char path[64];
    pid_t parent = getppid();
    /* It keeps its namespaces open under these numbers. */
    snprintf(path, sizeof path, "/proc/%d/fd/%d", atoi(arguments[0]), FIRST_NAMESPACE_FD + atoi(arguments[1]));
    int namespace = open(path, O_RDONLY);
    if (namespace < 0 || setns(namespace, CLONE_NEWNET)) die("entering the namespace");
    close(namespace);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* kept by exec */
    if (getppid() != parent) return 1;
    execvp(arguments[2], arguments + 2);
    die(arguments[2]);
    return 1;
}
