"""Captions in many scripts, made of everyday words and what people put between them; written for these tests."""

import random
import unicodedata

# Words of captions, by language; the scripts that mark vowels or tones with combining characters have them here.
WORDS = {
    "French": """
        un une le la chien chat forêt été garçon élève fenêtre château œuvre maïs où noël naïf à côté d'eau l'homme
        qu'il aujourd'hui grand-mère arc-en-ciel porte-t-il jusqu’au d’été lycée école Paris Éric Œuvre hôtel""",
    "Vietnamese": """
        một người đàn ông phụ nữ cậu bé đang chạy trên bãi cỏ xanh với chó mèo nước biển đường phố ngồi ghế áo đỏ
        trắng đen hai ba đứa trẻ chơi bóng Việt Nam Hà Nội thuyền cây cầu gỗ lướt sóng""",
    "Greek": """
        ένας άνδρας μία γυναίκα σκύλος γάτα τρέχει στο γρασίδι παιδί παίζει μπάλα θάλασσα κόκκινο σπίτι δρόμος ΟΔΟΣ
        Αθήνα ποδήλατο καθισμένος ήλιος ψωμί τραπέζι ο ἄνθρωπος ᾠδή προϊόν ταΐζει""",
    "Russian": """
        мужчина женщина собака кошка бежит по траве ребёнок играет с мячом на пляже красный дом улица Москва ёлка чёй-то
        мальчик велосипед стоит рядом какой-то по-русски снежный лёд подъезд семья й Санкт-Петербург в два""",
    "Arabic": """
        رَجُلٌ يَرْكُضُ في الحديقة امرأة تجلسُ على كُرْسِيّ كلب قطة طفل يلعب بالكرة البحرُ أزرق بيتٌ أحمر شارع مدينة
        القاهرة سيّارة دَرّاجة هٰذا اللّٰه شمسٌ وَلَدٌ صغير مُبتَسِم ٣ ١٢""",
    "Persian": """
        مردی می‌دود در پارک زنی روی صندلی نشسته است سگ گربه‌ها کودک با توپ بازی می‌کند دریا آبی خانه قرمز خیابان
        تهران دوچرخه ایستاده کنار پسر کوچک لبخند ۳ ۱۲ کتاب‌خانه""",
    "Hebrew": """
        איש רץ בפארק אישה יושבת על כיסא כלב חתול ילד משחק בכדור יָם כָּחוֹל בַּיִת אָדֹם רחוב תל אביב אופניים
        צה"ל ארה"ב ג'ירפה צ'יפס שׁוּלְחָן סֵפֶר קטן מחייך""",
    "Hindi": """
        एक आदमी पार्क में दौड़ रहा है औरत कुर्सी पर बैठी कुत्ता बिल्ली बच्चा गेंद से खेलता समुद्र नीला घर लाल सड़क दिल्ली
        साइकिल खड़ा पास लड़का छोटा मुस्कुराता हुआ क्‍या हैं पानी फ़ोन ज़मीन हिन्दी २ ४५""",
    "Bengali": """
        একজন মানুষ পার্কে দৌড়াচ্ছে মহিলা চেয়ারে বসে আছে কুকুর বিড়াল শিশু বল নিয়ে খেলছে সমুদ্র নীল বাড়ি লাল রাস্তা
        ঢাকা সাইকেল দাঁড়িয়ে পাশে ছেলে ছোট হাসছে বাংলা র‍্যাব দুঃখ ২ ৪৫""",
    "Tamil": """
        ஒரு மனிதன் பூங்காவில் ஓடுகிறான் பெண் நாற்காலியில் அமர்ந்திருக்கிறாள் நாய் பூனை குழந்தை பந்துடன் விளையாடுகிறது கடல் நீல
        வீடு சிவப்பு தெரு சென்னை மிதிவண்டி நிற்கிறான் அருகில் சிறுவன் சிறிய கொடி""",
    "Telugu": """
        ఒక మనిషి పార్కులో పరిగెత్తుతున్నాడు స్త్రీ కుర్చీలో కూర్చుంది కుక్క పిల్లి పిల్లవాడు బంతితో ఆడుతున్నాడు సముద్రం నీలం ఇల్లు ఎరుపు
        వీధి సైకిల్ నిలబడి చిన్న నవ్వుతూ""",
    "Thai": """
        ผู้ชายกำลังวิ่งในสวน ผู้หญิงนั่งบนเก้าอี้ สุนัขสีดำ แมวตัวหนึ่ง เด็กเล่นลูกบอล ทะเลสีฟ้า บ้านสีแดง ถนน กรุงเทพ จักรยาน
        ยืนอยู่ข้างๆ น้ำ เด็กผู้ชายตัวเล็กยิ้ม รถไฟ ๒ ๔๕""",
    "Chinese": """
        一个男人在公园里跑步 女人坐在椅子上 一只黑狗 猫 孩子们玩球
        蓝色的大海 红房子 街道 北京 自行车 站在旁边 小男孩笑着 穿T恤 臺灣 两只 ２只""",
    "Japanese": """
        男の人が公園を走っている 女性が椅子に座っています 黒い犬 ねこ 子供がボールで遊ぶ 青い海 赤い家 通り 東京 自転車
        コーヒーカップ ガラス パン ﾊﾝｶｸ 々 小さな男の子が笑う""",
    "Korean": """
        한 남자가 공원에서 달리고 있다 여자가 의자에 앉아 있습니다 검은 개 고양이 아이들이 공을 가지고 놀고
        푸른 바다 빨간 집 거리 서울 자전거 옆에 서 작은 소년이 웃는다""",
    "Georgian": """
        კაცი გარბის პარკში ქალი ზის სკამზე ძაღლი კატა ბავშვი თამაშობს ბურთით ზღვა ლურჯი სახლი წითელი ქუჩა თბილისი
        ველოსიპედი დგას გვერდით პატარა ბიჭი""",
    "Turkish": """
        bir adam parkta koşuyor kadın sandalyede oturuyor köpek kedi çocuk topla oynuyor deniz mavi ev kırmızı sokak
        İstanbul'da Türkiye'nin bisiklet ağaç güneş Isparta ığdır şişe öğrenci""",
    "Czech": """
        muž běží v parku žena sedí na židli pes kočka dítě si hraje s míčem moře modré dům červený ulice Praha kolo
        stojí vedle malý chlapec úsměv žluťoučký kůň ď ť Ř""",
}  # fmt: skip
STOPS = {"Hindi": "।", "Bengali": "।", "Chinese": "。", "Japanese": "。", "Arabic": "؟", "Persian": "؟"}
COMMAS = {"Arabic": "،", "Persian": "،", "Chinese": "，", "Japanese": "、"}
_SIGNS = ("–", "—", "…", "&", "😀", "⚽", "\u200b")
_QUOTES = ("“”", "«»", "„“", '""', "‘’", "「」", "()", "[]")


def captions_in(language: str, count: int, seed: int = 0) -> list[str]:
    """``count`` captions of 3 to 12 words, the same for the same seed."""
    rng, words = random.Random(f"{language} {seed}"), WORDS[language].split()
    return [_caption(rng, words, language) for _ in range(count)]


def _caption(rng: random.Random, words: list[str], language: str) -> str:
    chosen = rng.choices(words, k=rng.randint(3, 12))
    place, odd = rng.randrange(len(chosen)), rng.random()
    word = chosen[place]
    if odd < 0.08:
        chosen[place] = f"{word}{COMMAS.get(language, ',')}"
    elif odd < 0.14:
        opening, closing = rng.choice(_QUOTES)
        chosen[place] = f"{opening}{word}{closing}"
    elif odd < 0.18:
        chosen[place] = f"{rng.choice(['3', '12', '5.5', '50%', '2x'])} {word}"
    elif odd < 0.20:
        chosen[place] = f"{word} {rng.choice(_SIGNS)}"
    elif odd < 0.22:
        chosen[place] = f"{word}: {rng.choice(words)};"
    text = " ".join(chosen) + rng.choice(
        ["", "", " ", "!", STOPS.get(language, "."), ".", f" {STOPS.get(language, '.')}"]
    )
    if rng.random() < 0.02:
        text = "\ufeff" + text
    return unicodedata.normalize("NFD", text) if rng.random() < 0.15 else text
