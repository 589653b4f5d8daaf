/*
 * Attaches an NBD export as /dev/nbdN and keeps it attached: when the server goes away and comes back (a restart, a lost
 * network), it reconnects and hands the kernel the new connections, and the kernel sends the requests in flight again.
 * Filesystems on the device see a pause and no error. If the export has grown, the device grows too (Linux 5.10 or later);
 * then run 'resize2fs /dev/nbd0' or 'xfs_growfs /mnt'. Talks to the kernel by netlink; needs Linux 4.12 or later.
 *
 *   cc -O2 -o nbd-attach nbd-attach.c
 *   modprobe nbd && ./nbd-attach 192.0.2.1:10809 disk /dev/nbd0 && mount /dev/nbd0 /mnt
 *   umount /mnt && kill "$(cat /run/nbd-attach.nbd0.pid)"
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <linux/nbd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum {
	MAX_CONNECTIONS = 16,
	MAX_REPLY = 64 * 1024,     /* longest option reply that is read */
	MESSAGE_SIZE = 4096,       /* netlink messages, ours and the kernel's */
	HANDSHAKE_SECONDS = 10,    /* a server that is silent for so long is tried again */
	FIRST_PAUSE_MS = 100,      /* between attempts to connect; doubled up to the last */
	LAST_PAUSE_MS = 2000,
	LOOK_MS = 2000,            /* how often to see whether another program has detached it */
	MIN_BLOCK_SIZE = 512,
	MAX_BLOCK_SIZE = 4096,
};

/* NBD proto.md, fixed newstyle negotiation */
#define INIT_MAGIC UINT64_C(0x4e42444d41474943)
#define OPTION_MAGIC UINT64_C(0x49484156454f5054)
#define OPTION_REPLY_MAGIC UINT64_C(0x0003e889045565a9)
enum { FLAG_FIXED_NEWSTYLE = 1, FLAG_NO_ZEROES = 2 };
enum { OPTION_GO = 7, REPLY_ACK = 1, REPLY_INFO = 3, INFO_EXPORT = 0, INFO_BLOCK_SIZE = 3 };
#define REPLY_ERROR UINT32_C(0x80000000)

struct export {
	uint64_t size;
	uint16_t flags;
	uint32_t min_block;
};

/* A connection that the kernel has, too. `size`: of the export when it was opened; the server keeps to it here. */
struct connection {
	int socket;
	uint64_t size;
};

static const char *device = "nbd";
static volatile sig_atomic_t asked_to_end;

static void on_signal(int signal)
{
	(void)signal;
	asked_to_end = 1;
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fprintf(stderr, "nbd-attach: %s: ", device);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
}

/* ---- the server ---- */

static bool receive(int fd, void *into, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t count = recv(fd, (char *)into + done, length - done, 0);

		if (count > 0) {
			done += (size_t)count;
		} else if (count == 0) {
			say("the server closed the connection during the handshake");
			return false;
		} else if (errno != EINTR || asked_to_end) {
			say("reading from the server: %s", strerror(errno));
			return false;
		}
	}
	return true;
}

static bool transmit(int fd, const void *data, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t count = send(fd, (const char *)data + done, length - done, MSG_NOSIGNAL);

		if (count >= 0) {
			done += (size_t)count;
		} else if (errno != EINTR || asked_to_end) {
			say("writing to the server: %s", strerror(errno));
			return false;
		}
	}
	return true;
}

/* HOST, HOST:PORT, [IPV6]:PORT or the path of a unix socket. */
static int dial(const char *address)
{
	const struct timeval patience = {.tv_sec = HANDSHAKE_SECONDS};
	int fd = -1;

	if (address[0] == '/') {
		struct sockaddr_un path = {.sun_family = AF_UNIX};

		if (strlen(address) >= sizeof(path.sun_path)) {
			say("%s is too long for a unix socket", address);
			return -1;
		}
		strcpy(path.sun_path, address);
		fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (fd < 0 || connect(fd, (struct sockaddr *)&path, sizeof(path)) < 0)
			goto failed;
	} else {
		const struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
		struct addrinfo *found, *each;
		char host[256];
		const char *colon = strrchr(address, ':');
		const char *port = "10809";
		size_t length = strlen(address);

		if (colon != NULL && (address[0] == '[' ? colon[-1] == ']' : strchr(address, ':') == colon)) {
			port = colon + 1;
			length = (size_t)(colon - address);
		}
		if (address[0] == '[' && length > 1) {
			address++;
			length -= 2;
		}
		snprintf(host, sizeof(host), "%.*s", (int)length, address);
		int problem = getaddrinfo(host, port, &hints, &found);
		if (problem != 0) {
			say("%s port %s: %s", host, port, gai_strerror(problem));
			return -1;
		}
		for (each = found; each != NULL; each = each->ai_next) {
			fd = socket(each->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
			if (fd >= 0)
				setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
			if (fd >= 0 && connect(fd, each->ai_addr, each->ai_addrlen) == 0)
				break;
			int error = errno;
			if (fd >= 0)
				close(fd);
			fd = -1;
			errno = error;
		}
		freeaddrinfo(found);
		if (fd < 0)
			goto failed;
		/* a server whose machine is gone is noticed even without requests */
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
		setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &(int){1}, sizeof(int));
		setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &(int){10}, sizeof(int));
		setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &(int){5}, sizeof(int));
		setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &(int){3}, sizeof(int));
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience));
	return fd;
failed:
	say("connecting to %s: %s", address, strerror(errno));
	if (fd >= 0)
		close(fd);
	return -1;
}

/* The negotiation up to the first request. Simple replies only: the kernel supports no others. */
static bool negotiate(int fd, const char *name, struct export *export)
{
	struct __attribute__((packed)) {
		uint64_t init, option;
		uint16_t flags;
	} hello;
	const size_t name_length = strlen(name);
	char request[4 + 16 + 4 + 4096 + 4];
	size_t at = 0;

	if (!receive(fd, &hello, sizeof(hello)))
		return false;
	if (be64toh(hello.init) != INIT_MAGIC || be64toh(hello.option) != OPTION_MAGIC) {
		say("the server there does not speak NBD's newstyle handshake");
		return false;
	}
	const uint16_t server = be16toh(hello.flags);
	if (!(server & FLAG_FIXED_NEWSTYLE)) {
		say("the server is too old: it has no fixed newstyle handshake");
		return false;
	}
#define PUT(bits, value) \
	do { uint##bits##_t number = htobe##bits(value); memcpy(request + at, &number, sizeof(number)); at += sizeof(number); } while (0)
	PUT(32, FLAG_FIXED_NEWSTYLE | (server & FLAG_NO_ZEROES));
	PUT(64, OPTION_MAGIC);
	PUT(32, OPTION_GO);
	PUT(32, (uint32_t)(4 + name_length + 4));
	PUT(32, (uint32_t)name_length);
	memcpy(request + at, name, name_length);
	at += name_length;
	PUT(16, 1);
	PUT(16, INFO_BLOCK_SIZE);
#undef PUT
	if (!transmit(fd, request, at))
		return false;

	*export = (struct export){.min_block = 1};
	for (bool has_size = false;;) {
		static unsigned char data[MAX_REPLY + 1];
		struct __attribute__((packed)) {
			uint64_t magic;
			uint32_t option, type, length;
		} reply;

		if (!receive(fd, &reply, sizeof(reply)))
			return false;
		const uint32_t type = be32toh(reply.type), length = be32toh(reply.length);
		if (be64toh(reply.magic) != OPTION_REPLY_MAGIC || be32toh(reply.option) != OPTION_GO || length > MAX_REPLY) {
			say("the server's answer is invalid");
			return false;
		}
		if (!receive(fd, data, length))
			return false;
		data[length] = '\0';
		if (type & REPLY_ERROR) {
			say("the server refuses '%s': %s (error %u)", name, length > 0 ? (char *)data : "no reason given",
			    type & ~REPLY_ERROR);
			return false;
		}
		if (type == REPLY_ACK) {
			if (has_size)
				return true;
			say("the server did not say how large '%s' is", name);
			return false;
		}
		if (type != REPLY_INFO || length < 2)
			continue;
		const int info = data[0] << 8 | data[1];
		if (info == INFO_EXPORT && length == 12) {
			uint64_t size;
			uint16_t flags;

			memcpy(&size, data + 2, sizeof(size));
			memcpy(&flags, data + 10, sizeof(flags));
			export->size = be64toh(size);
			export->flags = be16toh(flags);
			has_size = true;
		} else if (info == INFO_BLOCK_SIZE && length == 14) {
			memcpy(&export->min_block, data + 2, sizeof(export->min_block));
			export->min_block = be32toh(export->min_block);
		}
	}
}

/* A connection that is ready for the kernel, or -1 after an error line. */
static int open_export(const char *address, const char *name, struct export *export)
{
	const struct timeval for_ever = {0};
	int fd = dial(address);

	if (fd < 0)
		return -1;
	if (!negotiate(fd, name, export)) {
		close(fd);
		return -1;
	}
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &for_ever, sizeof(for_ever));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &for_ever, sizeof(for_ever));
	return fd;
}

/* Disconnect in order a connection that the kernel does not have: otherwise the server takes it for a lost client. */
static void leave(int fd)
{
	const struct nbd_request goodbye = {.magic = htobe32(NBD_REQUEST_MAGIC), .type = htobe32(NBD_CMD_DISC)};

	transmit(fd, &goodbye, sizeof(goodbye));
	close(fd);
}

static void leave_all(const struct connection *connections, int count)
{
	for (int n = 0; n < count; n++)
		leave(connections[n].socket);
}

/* The size that all connections accept: a request behind it would be refused on some of them. */
static uint64_t smallest_size(const struct connection *connections, int count)
{
	uint64_t size = UINT64_MAX;

	for (int n = 0; n < count; n++)
		if (connections[n].size < size)
			size = connections[n].size;
	return size;
}

/* The first connection that has ended, by the peer or by the kernel, or -1. */
static int find_ended(const struct connection *connections, int count)
{
	for (int n = 0; n < count; n++) {
		struct pollfd state = {.fd = connections[n].socket};

		if (poll(&state, 1, 0) == 1 && (state.revents & POLLHUP))
			return n;
	}
	return -1;
}

/* ---- the kernel ---- */

struct message {
	union {
		struct nlmsghdr header;
		char bytes[MESSAGE_SIZE];
	};
};

static void begin(struct message *message, uint16_t family, uint8_t command)
{
	static uint32_t sequence;
	struct genlmsghdr *generic = NLMSG_DATA(&message->header);

	memset(message, 0, sizeof(*message));
	message->header.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN);
	message->header.nlmsg_type = family;
	message->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	message->header.nlmsg_seq = ++sequence;
	generic->cmd = command;
	generic->version = 1;
}

static struct nlattr *add(struct message *message, uint16_t type, const void *data, size_t length)
{
	struct nlattr *attribute = (struct nlattr *)(message->bytes + NLMSG_ALIGN(message->header.nlmsg_len));

	attribute->nla_type = type;
	attribute->nla_len = (uint16_t)(NLA_HDRLEN + length);
	if (length > 0)
		memcpy((char *)attribute + NLA_HDRLEN, data, length);
	message->header.nlmsg_len = NLMSG_ALIGN(message->header.nlmsg_len) + NLA_ALIGN(attribute->nla_len);
	return attribute;
}

static void add_u32(struct message *message, uint16_t type, uint32_t value)
{
	add(message, type, &value, sizeof(value));
}

static void add_u64(struct message *message, uint16_t type, uint64_t value)
{
	add(message, type, &value, sizeof(value));
}

/* Close the attribute `nest` around everything that was added since. */
static void end_nest(struct message *message, struct nlattr *nest)
{
	nest->nla_type |= NLA_F_NESTED;
	nest->nla_len = (uint16_t)(message->bytes + message->header.nlmsg_len - (char *)nest);
}

static void add_sockets(struct message *message, const struct connection *connections, int count)
{
	struct nlattr *all = add(message, NBD_ATTR_SOCKETS, NULL, 0);

	for (int n = 0; n < count; n++) {
		struct nlattr *item = add(message, NBD_SOCK_ITEM, NULL, 0);

		add_u32(message, NBD_SOCK_FD, (uint32_t)connections[n].socket);
		end_nest(message, item);
	}
	end_nest(message, all);
}

static const struct nlattr *find(const void *start, size_t length, uint16_t type)
{
	for (const char *at = start; length >= NLA_HDRLEN;) {
		const struct nlattr *attribute = (const struct nlattr *)at;

		if (attribute->nla_len < NLA_HDRLEN || attribute->nla_len > length)
			return NULL;
		if ((attribute->nla_type & NLA_TYPE_MASK) == type)
			return attribute;
		size_t step = NLA_ALIGN(attribute->nla_len);
		if (step >= length)
			return NULL;
		at += step;
		length -= step;
	}
	return NULL;
}

static const void *value_of(const struct nlattr *attribute)
{
	return (const char *)attribute + NLA_HDRLEN;
}

static const struct nlattr *attribute_of(const struct nlmsghdr *header, uint16_t type)
{
	const char *start = (const char *)NLMSG_DATA(header) + GENL_HDRLEN;

	if (header->nlmsg_len < NLMSG_LENGTH(GENL_HDRLEN))
		return NULL;
	return find(start, header->nlmsg_len - NLMSG_LENGTH(GENL_HDRLEN), type);
}

/* Send, and wait for the kernel's result: 0 or a negative errno. Other answers are left in `answer`, if given. */
static int ask(int netlink, struct message *message, struct message *answer)
{
	if (send(netlink, message, message->header.nlmsg_len, 0) < 0)
		return -errno;
	for (;;) {
		struct message got;
		ssize_t length = recv(netlink, &got, sizeof(got), 0);

		if (length < 0 && errno == EINTR)
			continue;
		if (length < 0)
			return -errno;
		int left = (int)length;
		for (struct nlmsghdr *header = &got.header; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
			if (header->nlmsg_seq != message->header.nlmsg_seq)
				continue;
			if (header->nlmsg_type == NLMSG_ERROR)
				return ((struct nlmsgerr *)NLMSG_DATA(header))->error;
			if (answer != NULL)
				memcpy(answer, header, header->nlmsg_len);
		}
	}
}

static int open_netlink(void)
{
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
	struct sockaddr_nl address = {.nl_family = AF_NETLINK};

	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		say("netlink: %s", strerror(errno));
		exit(1);
	}
	return fd;
}

/* The number of the nbd family on this machine, and that of the multicast group for dead connections. */
static uint16_t find_family(int netlink, uint32_t *group)
{
	struct message message, answer;
	const struct nlattr *id, *groups;

	memset(&answer, 0, sizeof(answer));
	begin(&message, GENL_ID_CTRL, CTRL_CMD_GETFAMILY);
	add(&message, CTRL_ATTR_FAMILY_NAME, NBD_GENL_FAMILY_NAME, sizeof(NBD_GENL_FAMILY_NAME));
	int problem = ask(netlink, &message, &answer);
	if (problem != 0 || (id = attribute_of(&answer.header, CTRL_ATTR_FAMILY_ID)) == NULL) {
		say(problem == -ENOENT ? "the kernel has no nbd (modprobe nbd)" : "asking the kernel for nbd: %s", strerror(-problem));
		exit(1);
	}
	*group = 0;
	groups = attribute_of(&answer.header, CTRL_ATTR_MCAST_GROUPS);
	if (groups != NULL) {
		const struct nlattr *first = find(value_of(groups), groups->nla_len - NLA_HDRLEN, 1);
		const struct nlattr *number =
			first ? find(value_of(first), first->nla_len - NLA_HDRLEN, CTRL_ATTR_MCAST_GRP_ID) : NULL;

		if (number != NULL)
			memcpy(group, value_of(number), sizeof(*group));
	}
	if (*group == 0) {
		say("the kernel's nbd does not report dead connections; Linux 4.12 or later is needed");
		exit(1);
	}
	uint16_t family;
	memcpy(&family, value_of(id), sizeof(family));
	return family;
}

/* How many connections of device `index` the kernel has reported dead since the last call. `all` if reports were lost. */
static int count_dead(int events, uint16_t family, uint32_t index, int all)
{
	int dead = 0;

	for (;;) {
		struct message got;
		ssize_t length = recv(events, &got, sizeof(got), MSG_DONTWAIT);

		if (length < 0 && errno == EINTR)
			continue;
		if (length < 0 && errno == ENOBUFS) {
			dead = all;
			continue;
		}
		if (length < 0)
			return dead < all ? dead : all;
		int left = (int)length;
		for (struct nlmsghdr *header = &got.header; NLMSG_OK(header, left); header = NLMSG_NEXT(header, left)) {
			const struct nlattr *of = header->nlmsg_type == family ? attribute_of(header, NBD_ATTR_INDEX) : NULL;

			if (of != NULL && ((struct genlmsghdr *)NLMSG_DATA(header))->cmd == NBD_CMD_LINK_DEAD &&
			    *(const uint32_t *)value_of(of) == index)
				dead++;
		}
	}
}

/* ---- the program ---- */

static long number(const char *text, long low, long high, char option)
{
	char *end;
	long value = strtol(text, &end, 10);

	if (*text == '\0' || *end != '\0' || value < low || value > high) {
		fprintf(stderr, "nbd-attach: -%c takes a number from %ld to %ld, not '%s'\n", option, low, high, text);
		exit(2);
	}
	return value;
}

static _Noreturn void usage(int code)
{
	fputs("usage: nbd-attach [OPTIONS] HOST[:PORT]|/SOCKET EXPORT /dev/nbdN\n"
	      "  -c N   connections (1; more only if the export allows it)\n"
	      "  -t N   seconds after which a request without an answer is sent again over another connection (30)\n"
	      "  -d N   seconds to wait for the server to come back before requests fail (3600)\n"
	      "  -b N   block size: 512, 1024, 2048 or 4096 (512, or the server's minimum)\n"
	      "  -r     read-only\n"
	      "  -f     stay in the foreground\n"
	      "SIGTERM detaches the device, unless it is in use.\n",
	      code == 0 ? stdout : stderr);
	exit(code);
}

/* A number from a file in the device's sysfs directory: the first, or the sum of all. */
static bool look_up(uint32_t index, const char *file, bool sum, uint64_t *value)
{
	char path[64];
	unsigned long long each;
	bool found = false;

	snprintf(path, sizeof(path), "/sys/block/nbd%u/%s", index, file);
	FILE *from = fopen(path, "r");
	if (from == NULL)
		return false;
	for (*value = 0; fscanf(from, "%llu", &each) == 1 && (sum || !found); found = true)
		*value += each;
	fclose(from);
	return found;
}

/* Attached, and by us, as the kernel reports: another process may have detached it and attached another export since. */
static bool is_attached(uint32_t index, uint64_t attacher)
{
	uint64_t found;

	return look_up(index, "pid", false, &found) && found == attacher;
}

/* Before Linux 5.3 a new size is ignored; before 5.10 the block size is set along with it, under a mounted filesystem. */
static bool kernel_can_grow(void)
{
	struct utsname system;
	int major = 0, minor = 0;

	if (uname(&system) < 0 || sscanf(system.release, "%d.%d", &major, &minor) != 2)
		return false;
	return major > 5 || (major == 5 && minor >= 10);
}

/*
 * Tell the kernel the new, larger size. Not together with new connections, and with no request in flight: since Linux 6.9 the
 * kernel waits here until all requests are answered, and takes no new connection meanwhile.
 */
static bool grow(int netlink, uint16_t family, uint32_t index, uint64_t size)
{
	struct message message;
	uint64_t sectors;

	if (!kernel_can_grow()) {
		say("the export has grown, the device cannot: that needs Linux 5.10; detach and attach it to use %llu bytes",
		    (unsigned long long)size);
		return false;
	}
	begin(&message, family, NBD_CMD_RECONFIGURE);
	add_u32(&message, NBD_ATTR_INDEX, index);
	add_u64(&message, NBD_ATTR_SIZE_BYTES, size);
	int problem = ask(netlink, &message, NULL);
	if (problem != 0) {
		say("growing to %llu bytes: %s; detach and attach it", (unsigned long long)size, strerror(-problem));
		return false;
	}
	if (!look_up(index, "size", false, &sectors) || sectors * 512 != size) {
		say("the kernel has not taken the new size, %llu bytes; detach and attach it", (unsigned long long)size);
		return false;
	}
	say("has grown to %llu bytes", (unsigned long long)size);
	return true;
}

/* Unless another process has attached the device since and written its own. */
static void remove_pid_file(const char *path)
{
	int pid = 0;
	FILE *file = fopen(path, "r");

	if (file == NULL)
		return;
	if (fscanf(file, "%d", &pid) == 1 && pid == getpid())
		unlink(path);
	fclose(file);
}

static uint64_t seconds_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec;
}

static bool pause_ms(int milliseconds)
{
	poll(NULL, 0, milliseconds);
	return !asked_to_end;
}

int main(int count_of_arguments, char **arguments)
{
	struct export export;
	struct message message;
	struct connection connections[MAX_CONNECTIONS];
	int wanted = 1, request_seconds = 30, dead_seconds = 3600, block = 0;
	bool read_only = false, foreground = false;
	uint32_t group, index;
	char pid_file[64];

	for (int option; (option = getopt(count_of_arguments, arguments, "c:t:d:b:rfh")) != -1;) {
		switch (option) {
		case 'c': wanted = (int)number(optarg, 1, MAX_CONNECTIONS, 'c'); break;
		case 't': request_seconds = (int)number(optarg, 1, 86400, 't'); break;
		case 'd': dead_seconds = (int)number(optarg, 1, 30 * 86400, 'd'); break;
		case 'b': block = (int)number(optarg, MIN_BLOCK_SIZE, MAX_BLOCK_SIZE, 'b'); break;
		case 'r': read_only = true; break;
		case 'f': foreground = true; break;
		case 'h': usage(0);
		default: usage(2);
		}
	}
	if (count_of_arguments - optind != 3 || (block & (block - 1)) != 0)
		usage(2);
	const char *address = arguments[optind], *name = arguments[optind + 1], *node = arguments[optind + 2];
	char rest;
	if (sscanf(node, "/dev/nbd%u%c", &index, &rest) != 1 || strlen(name) > 4096)
		usage(2);
	device = node + strlen("/dev/");

	const int netlink = open_netlink(), events = open_netlink();
	const uint16_t family = find_family(netlink, &group);
	/* before the first connection can die */
	if (setsockopt(events, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, &group, sizeof(group)) < 0) {
		say("listening for dead connections: %s", strerror(errno));
		return 1;
	}

	for (int n = 0; n < wanted; n++) {
		connections[n].socket = open_export(address, name, &export);
		if (connections[n].socket < 0) {
			leave_all(connections, n);
			return 1;
		}
		connections[n].size = export.size;
		if (n == 0 && wanted > 1 && !(export.flags & NBD_FLAG_CAN_MULTI_CONN)) {
			say("'%s' allows one connection only", name);
			wanted = 1;
		}
	}
	uint64_t size = smallest_size(connections, wanted);
	if (block == 0)
		block = export.min_block > MIN_BLOCK_SIZE ? (int)export.min_block : MIN_BLOCK_SIZE;
	if ((uint32_t)block < export.min_block || block > MAX_BLOCK_SIZE || size % (uint64_t)block != 0) {
		say("blocks of %d bytes do not fit '%s': %llu bytes, at least %u a block", block, name,
		    (unsigned long long)size, export.min_block);
		leave_all(connections, wanted);
		return 1;
	}
	begin(&message, family, NBD_CMD_CONNECT);
	add_u32(&message, NBD_ATTR_INDEX, index);
	add_u64(&message, NBD_ATTR_SIZE_BYTES, size);
	add_u64(&message, NBD_ATTR_BLOCK_SIZE_BYTES, (uint64_t)block);
	/* Without a timeout the kernel never repeats a request that was in flight when its connection died. */
	add_u64(&message, NBD_ATTR_TIMEOUT, (uint64_t)request_seconds);
	/* Without this it fails requests as soon as no connection is left. */
	add_u64(&message, NBD_ATTR_DEAD_CONN_TIMEOUT, (uint64_t)dead_seconds);
	add_u64(&message, NBD_ATTR_SERVER_FLAGS, export.flags | (read_only ? NBD_FLAG_READ_ONLY : 0u));
	add_u64(&message, NBD_ATTR_CLIENT_FLAGS, 0);
	add_sockets(&message, connections, wanted);
	int problem = ask(netlink, &message, NULL);
	if (problem != 0) {
		say(problem == -EBUSY ? "is in use already" : "attaching it: %s", strerror(-problem));
		leave_all(connections, wanted);
		return 1;
	}
	uint64_t attacher = 0;
	look_up(index, "pid", false, &attacher);
	/* The kernel has its own references to the sockets; ours show which have ended. */
	say("attached to '%s' at %s: %llu bytes, %d connection%s%s", name, address, (unsigned long long)size, wanted,
	    wanted == 1 ? "" : "s", (export.flags & NBD_FLAG_READ_ONLY) || read_only ? ", read-only" : "");

	const struct sigaction ending = {.sa_handler = on_signal};
	sigaction(SIGTERM, &ending, NULL);
	sigaction(SIGINT, &ending, NULL);
	if (!foreground && daemon(0, 1) < 0)
		say("going to the background: %s", strerror(errno));
	/* Memory that is needed to bring the device back must not have to be read from the device. */
	if (mlockall(MCL_CURRENT | MCL_FUTURE) < 0)
		say("staying in memory: %s", strerror(errno));
	snprintf(pid_file, sizeof(pid_file), "/run/nbd-attach.%s.pid", device);
	FILE *pid = fopen(pid_file, "w");
	if (pid != NULL) {
		fprintf(pid, "%d\n", getpid());
		fclose(pid);
	}

	bool had_ended = false;
	uint64_t asked_for = size, connected_at = seconds_now();
	for (int dead = 0, pause = FIRST_PAUSE_MS; !asked_to_end;) {
		const uint64_t possible = smallest_size(connections, wanted) / (uint64_t)block * (uint64_t)block;
		const bool can_grow = possible > size && possible != asked_for;
		struct pollfd heard = {.fd = events, .events = POLLIN};

		poll(&heard, 1, dead > 0 ? 0 : can_grow ? FIRST_PAUSE_MS : LOOK_MS);
		int died = count_dead(events, family, index, wanted);
		if (died > 0 && dead == 0)
			say("connection lost; connecting again");
		dead = dead + died < wanted ? dead + died : wanted;
		if (!is_attached(index, attacher)) {
			say("was detached by another program");
			remove_pid_file(pid_file);
			return 0;
		}
		if (dead == 0) {
			uint64_t under_way = 0;

			/* Requests that were in flight when their connection died are sent again after about request_seconds. */
			if (can_grow && (seconds_now() - connected_at > 2 * (uint64_t)request_seconds ||
					 (look_up(index, "inflight", true, &under_way) && under_way == 0))) {
				asked_for = possible;
				if (grow(netlink, family, index, possible))
					size = possible;
			}
			/* If the kernel's report was lost: a connection that has ended at two looks is dead for the kernel too. */
			const bool has_ended = !can_grow && !(heard.revents & POLLIN) && find_ended(connections, wanted) >= 0;
			if (has_ended && had_ended)
				dead = 1;
			had_ended = has_ended;
			continue;
		}
		had_ended = false;
		int ended = find_ended(connections, wanted);
		if (ended < 0) {
			/* The kernel has reported it and will shut it down in a moment; or it has reported too many. */
			if (!pause_ms(FIRST_PAUSE_MS))
				break;
			ended = find_ended(connections, wanted);
			if (ended < 0) {
				dead = 0;
				continue;
			}
		}
		struct export now;
		struct connection fresh = {.socket = open_export(address, name, &now)};
		if (fresh.socket >= 0 && now.size < size) {
			say("'%s' has become smaller, %llu bytes instead of %llu, and is not used", name, (unsigned long long)now.size,
			    (unsigned long long)size);
			leave(fresh.socket);
			fresh.socket = -1;
		}
		if (fresh.socket >= 0 && (now.flags & NBD_FLAG_READ_ONLY) != (export.flags & NBD_FLAG_READ_ONLY)) {
			say("'%s' has become %s, and is not used", name, now.flags & NBD_FLAG_READ_ONLY ? "read-only" : "writable");
			leave(fresh.socket);
			fresh.socket = -1;
		}
		if (fresh.socket < 0) {
			if (!pause_ms(pause))
				break;
			pause = pause * 2 < LAST_PAUSE_MS ? pause * 2 : LAST_PAUSE_MS;
			continue;
		}
		pause = FIRST_PAUSE_MS;
		if (!is_attached(index, attacher)) {
			leave(fresh.socket);
			continue;
		}
		begin(&message, family, NBD_CMD_RECONFIGURE);
		add_u32(&message, NBD_ATTR_INDEX, index);
		add_sockets(&message, &fresh, 1);
		problem = ask(netlink, &message, NULL);
		if (problem != 0) {
			say("handing a new connection to the kernel: %s", strerror(-problem));
			leave(fresh.socket);
			if (!pause_ms(LAST_PAUSE_MS))
				break;
			continue;
		}
		close(connections[ended].socket);
		fresh.size = now.size;
		connections[ended] = fresh;
		connected_at = seconds_now();
		if (--dead == 0)
			say("connected again");
	}

	int in_use = open(node, O_RDONLY | O_EXCL | O_CLOEXEC);
	remove_pid_file(pid_file);
	if (in_use < 0 && errno == EBUSY) {
		say("is in use and stays attached, but will not be reconnected; unmount it and run 'nbd-client -d %s'", node);
		return 1;
	}
	if (in_use >= 0)
		close(in_use);
	begin(&message, family, NBD_CMD_DISCONNECT);
	add_u32(&message, NBD_ATTR_INDEX, index);
	problem = ask(netlink, &message, NULL);
	if (problem != 0) {
		say("detaching it: %s", strerror(-problem));
		return 1;
	}
	say("detached");
	return 0;
}
